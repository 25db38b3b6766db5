"""The processes of a run: collectives, the watchdog, agreement and signals."""
