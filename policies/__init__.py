"""What acts: policies, chunk executors, rollouts, evaluation, reports."""
