"""Errors that are the user's to mend. The command line prints one line for each and exits with its status.

| class | exit status | when |
|---|---|---|
| ParityError | 1 | our numbers are not those of a reference |
| ConfigError | 2 | unknown key, wrong type, impossible value, unusable argument |
| DataError | 3 | a record, shard or data folder that cannot be used |
| CheckpointError | 4 | no checkpoint, or one of another config |
| DeviceError | 5 | fewer devices than the mesh asks for |
| StorageError | 6 | disk full or not writable; what was there before is still there |
| BusyError | 7 | another job is writing the same run folder |
| Interrupted | 130 | Ctrl-C: stopped cleanly, resumable |
| Preempted | 143 | SIGTERM, as a machine that is taken away sends it: stopped cleanly, to be started again |
"""


class UserError(Exception):
    """Base of the errors shown without a traceback. The message says what is wrong and what to do."""

    exit_status = 1


class ParityError(UserError):
    exit_status = 1


class ConfigError(UserError):
    exit_status = 2


class DataError(UserError):
    exit_status = 3


class CheckpointError(UserError):
    exit_status = 4


class DeviceError(UserError):
    exit_status = 5


class StorageError(UserError):
    exit_status = 6


class BusyError(UserError):
    exit_status = 7


class Interrupted(UserError):
    exit_status = 130


class Preempted(Interrupted):
    exit_status = 143
