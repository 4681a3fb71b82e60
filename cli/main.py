"""The command `nbdmirror`: gathers the verbs and turns errors into messages and an exit status.

0: done. 1: could not be done. 2: wrong usage. (`verify`: 1 says that the copies differ, 3 that it could not be done.)
"""

import os
import sys

import click

from cli import output
from cli.connect import connect
from cli.create import create
from cli.demo import demo
from cli.demote import demote
from cli.destroy import destroy
from cli.diff import diff
from cli.disconnect import disconnect
from cli.inspect import inspect
from cli.invalidate import invalidate
from cli.promote import promote
from cli.resize import resize
from cli.serve import serve
from cli.status import status
from cli.switch import switch
from cli.verify import verify
from cli.why_slow import why_slow
from mirror.core.errors import MirrorError

VERBS = (
    *(create, serve, status, why_slow, promote, demote, switch, connect),
    *(disconnect, diff, verify, resize, invalidate, inspect, destroy, demo),
)


class InOrder(click.Group):
    """Lists the verbs in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [verb.name or "" for verb in VERBS]


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nbdmirror", message="%(prog)s %(version)s")
def nbdmirror() -> None:
    """A replicated block device: an NBD server that mirrors every write to a peer.

    \b
    A volume that stands alone:
      nbdmirror create /srv/vol --name vol --size 10G
      nbdmirror serve /srv/vol
    A mirrored one on this machine, to look at: nbdmirror demo
    """


for _verb in VERBS:
    nbdmirror.add_command(_verb)


def main() -> None:
    """The console script."""
    try:
        status_code = nbdmirror.main(prog_name="nbdmirror", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        status_code = 2
    except click.Abort:
        output.fail("stopped, nothing more was done")
        status_code = 1
    except click.ClickException as error:
        output.fail(error.format_message())
        status_code = 1
    except MirrorError as error:
        output.fail(error.message, error.remedy)
        status_code = 1
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status_code = 1
    except OSError as error:
        output.fail(str(error), output.OS_REMEDY)
        status_code = 1
    sys.exit(status_code if isinstance(status_code, int) else 0)
