"""High-level planners: what to do next, checked, executed by a policy, and ended by two keys."""
