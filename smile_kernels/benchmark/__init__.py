"""What a SMILE layer costs on this machine, beside its peers and against the machine's own limits."""
