"""Errors in four families, named by who has to act: operator, peer, device, or we ourselves.

Every error carries a sentence that says what happened to which thing and why, a remedy where a person can do
something, and the errno that an NBD client sees (only the plugin uses it). Our own bugs are assertions, not errors.
"""

import errno as codes


class MirrorError(Exception):
    """Base of all expected failures: `message` says what, to which thing and why; `remedy` says what to do."""

    default_errno = codes.EIO

    def __init__(self, message: str, remedy: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.errno = self.default_errno if errno is None else errno

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class OperatorError(MirrorError):
    """A wish that can't be granted: wrong input, wrong state, wrong moment."""

    default_errno = codes.EINVAL


class NotPrimary(OperatorError):
    """A request or a client reached a replica that does not serve."""

    default_errno = codes.ESHUTDOWN


class PeerError(MirrorError):
    """The peer broke the protocol, answered with an error, or went away."""

    default_errno = codes.EIO


class ProtocolError(PeerError):
    """Bytes that no sound peer of this version sends; ends the session (invariant one-session)."""


class LinkLost(PeerError):
    """The session ended while something waited for it."""


class DeviceError(MirrorError):
    """The operating system refused a read, a write or a flush of one of the replica's files."""

    def __init__(self, path: str, operation: str, errno: int, reason: str) -> None:
        super().__init__(f"{operation} {path} failed: {reason}", errno=errno)
        self.path = path
        self.operation = operation


class DamagedRecord(MirrorError):
    """A record whose checksum or contents can't be right; never taken for an empty one (invariant say-why)."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} is damaged: {why}")
        self.what = what
        self.why = why


class UnknownVersion(MirrorError):
    """A record or message of a version that this program does not know."""

    def __init__(self, what: str, found: int, known: int) -> None:
        super().__init__(
            f"{what} has version {found}, this program knows versions up to {known}",
            remedy="use the nbdmirror release that wrote it, or a newer one",
        )
        self.found = found
        self.known = known


class ConnectionCut(MirrorError):
    """A request that must stay unanswered because this replica stopped serving it (invariant silent-not-error)."""

    default_errno = codes.ESHUTDOWN
