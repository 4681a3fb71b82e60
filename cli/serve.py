"""nbdmirror serve: run the server of one replica in the foreground."""

import logging
import sys
from pathlib import Path

import click

from cli.parameters import ENDPOINT, directory_argument
from mirror.runtime import Runtime
from nbd_server import serve as parent
from nbd_server.config import Endpoint


@click.command()
@directory_argument
@click.option("--primary", is_flag=True, help="Come up as primary, if nothing speaks against it.")
@click.option("--nbd", type=ENDPOINT, help="Where NBD clients come in; DIR/nbd.sock if not given.")
@click.option("--insecure", is_flag=True, help="Allow addresses other than loopback: nothing is encrypted.")
@click.option("--shared", is_flag=True, help="Allow several clients at a time.")
def serve(directory: Path, primary: bool, nbd: Endpoint | None, insecure: bool, shared: bool) -> None:
    """Serve a replica until Ctrl-C or SIGTERM.

    Logs go to stderr.

    A volume without a peer comes up as primary, one with a peer as secondary unless --primary is given.

    \b
    Examples:
      nbdmirror serve /srv/vol
      nbdmirror serve /srv/vol --primary --nbd tcp:127.0.0.1:10809
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parent.ServeOptions(primary=primary, nbd=nbd, insecure=insecure, shared=shared)
    sys.exit(parent.serve(directory, options, Runtime()))
