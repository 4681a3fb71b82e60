"""Asks a replica's server from inside a guest, where starting the whole command costs seconds: `ask.py DIR COMMAND`."""

import json
import socket
import sys

with socket.socket(socket.AF_UNIX) as control:
    control.connect(f"{sys.argv[1]}/control.sock")
    control.sendall(json.dumps({"command": sys.argv[2]}).encode() + b"\n")
    sys.stdout.write(control.makefile().readline())
