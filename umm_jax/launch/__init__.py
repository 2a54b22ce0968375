"""Jobs on machines of others: what is given to the scheduler that starts them.

``job.py`` says what a job is; each other file writes it for one kind of cluster.
"""
