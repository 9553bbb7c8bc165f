"""What every test stands on."""

import signal

import edgekd  # before any runtime: it switches off what they would send

assert edgekd.TELEMETRY_OFF

# A shell that starts the tests in its background has them ignore Ctrl-C, and every program that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
