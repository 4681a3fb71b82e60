"""A real kernel's NBD client, in a User-Mode Linux guest."""
