"""The command `nbdmirror`: one file a verb, gathered by main.py."""
