"""On PYTHONPATH, this folder gives a Python in which no name can be looked up, without asking a name server."""

import socket


def fail(*unused, **options):
    raise socket.gaierror(-2, "Name or service not known")


socket.getaddrinfo = fail
