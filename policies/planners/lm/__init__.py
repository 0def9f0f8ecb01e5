"""Language models for planners: a tiny one of our own, local ones, and ones behind HTTP."""
