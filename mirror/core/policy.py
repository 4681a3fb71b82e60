"""What becomes of a split brain without asking the operator: the few policies that volume.toml may name.

A policy is for a number of primaries at the moment when the replicas meet again. The default is always to refuse.
Both replicas must name the same one, because both decide by the same table (mirror.core.generation), where each policy
is a row of its own. A policy only speaks where both maps reach back to a common generation: then what goes is known to
the block, and `nbdmirror diff` could have listed it.

What lost, though others offer it: discarding the older or the younger primary (clocks, and "younger" says nothing of
what a change is worth), a policy for two primaries (whichever lost would take acknowledged data from under a running
client), calling a script (a decision that the other side can't see).
"""

import enum
from typing import NamedTuple


class Policy(enum.Enum):
    """Whose changes go."""

    # Nobody's: stay apart until the operator says so.
    REFUSE = "refuse"
    # Of the replica that changed nothing since they parted, so that nothing acknowledged is lost.
    DISCARD_ZERO_CHANGES = "discard-zero-changes"
    # Of the replica that changed fewer blocks, whatever they were worth.
    DISCARD_LEAST_CHANGES = "discard-least-changes"
    # Of the replica that is secondary now, whatever it changed.
    DISCARD_SECONDARY = "discard-secondary"


class Policies(NamedTuple):
    """One for each number of primaries at the time of meeting."""

    no_primary: Policy = Policy.REFUSE
    one_primary: Policy = Policy.REFUSE
    two_primaries: Policy = Policy.REFUSE


REFUSE_ALWAYS = Policies()

# What may be chosen for each field of Policies.
ALLOWED = {
    "no_primary": (Policy.REFUSE, Policy.DISCARD_ZERO_CHANGES, Policy.DISCARD_LEAST_CHANGES),
    "one_primary": (Policy.REFUSE, Policy.DISCARD_ZERO_CHANGES, Policy.DISCARD_SECONDARY),
    # A primary never gives way by itself.
    "two_primaries": (Policy.REFUSE,),
}
