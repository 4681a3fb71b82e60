"""A replica as a server: nbdkit's plugin and its parent process, configuration, control socket."""
