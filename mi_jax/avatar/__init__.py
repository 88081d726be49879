"""What a model folder is, and what becomes one."""
