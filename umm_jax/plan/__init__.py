"""What a program needs before it runs: memory, operations, communication, and an estimate of its time."""
