"""Replication of a block volume between two replicas; knows neither nbdkit nor the command line."""
