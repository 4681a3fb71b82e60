"""Who came to the mirror's port and was turned away: said in the log, so that an operator finds it, but seldom.

The same of the same host is said once in a minute, and of all hosts together only so much: neither one that comes every
second nor many of them fill the log or the memory.
"""

import logging

from mirror.core.errors import LinkLost, MirrorError
from mirror.runtime import Runtime

log = logging.getLogger(__name__)

AGAIN_AFTER_S = 60.0
# Different ones that are said within that time, of one host and of all; a reason has 2 500 characters at most.
SAID_OF_HOST_MAX, SAID_MAX = 4, 64
# In place of those beyond.
OTHERS = "more than are named here, for the next minute"


class Strangers:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = runtime.lock()
        # When it was said: of a host (its ports differ each time), what was wrong.
        self._said_at_s: dict[tuple[str, str], float] = {}

    def turned_away(self, address: str, error: MirrorError) -> None:
        """Of the one at this address, because of this; called from any thread."""
        host = address.rpartition(":")[0] or address
        about = host, error.message.replace(address, host)
        now_s = self._runtime.now_s()
        with self._lock:
            kept = {one: at_s for one, at_s in self._said_at_s.items() if now_s - at_s < AGAIN_AFTER_S}
            if about not in kept and sum(one == host for one, _ in kept) >= SAID_OF_HOST_MAX:
                about = host, OTHERS
            if about not in kept and len(kept) >= SAID_MAX:
                about = "", OTHERS
            is_new = about not in kept
            if is_new:
                kept[about] = now_s
            self._said_at_s = kept
        if not is_new:
            return
        if about[1] == OTHERS:
            log.warning("turned away at the mirror's port: %s", " ".join(filter(None, (about[0], OTHERS))))
            return
        # Who falls silent or hangs up may be the peer on a bad link, or a port scan: nothing for an operator to do.
        level = logging.INFO if isinstance(error, LinkLost) else logging.WARNING
        log.log(level, "turned away at the mirror's port: %s: %s", address, error)
