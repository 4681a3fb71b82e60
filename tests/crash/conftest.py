"""The crash tests use the same replicas as the integration tests."""

from tests.integration.conftest import cluster

__all__ = ["cluster"]
