"""Sources of images, one module a kind, and how a config or a path becomes one."""
