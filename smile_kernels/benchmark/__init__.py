"""Time of a SMILE layer on this machine, compared with peers and with the limits of the machine."""
