"""Every error that this package raises on purpose.

    BitnetError
      FormatError            bytes that are not what they claim to be
      UnsupportedModelError  a sound checkpoint that this package does not run
      BackendError           a backend that is absent, unsuited or failed
      ConfigError            an option or a value that is not allowed
      MemoryLimitError       a request that does not fit
      ServeError             a request that the server refuses
      TrainError             training that cannot go on
      HubError               an upload that the Hugging Face hub refuses, or that breaks off

KernelWarning is no error: a kernel of ours is off on this machine, and stock MLX takes its place.

A message reads: [operation] what was given; what is allowed; what to do next.
"""


class BitnetError(Exception):
    """The root. The command line prints its text and exits with `exit_code`."""

    exit_code = 1


class FormatError(BitnetError):
    """A file or a tensor is damaged, truncated or inconsistent."""


class UnsupportedModelError(BitnetError):
    """The checkpoint is sound, but its family, storage or transform is not supported."""


class BackendError(BitnetError):
    """The chosen backend is missing here or cannot do what was asked."""


class ConfigError(BitnetError):
    """An argument or a setting is outside what is allowed."""

    exit_code = 2


class MemoryLimitError(BitnetError):
    """The request needs more memory than is allowed."""


class ServeError(BitnetError):
    """The server cannot honour a request."""


class TrainError(BitnetError):
    """Training cannot go on: the loss or a gradient is no finite number."""


class HubError(BitnetError):
    """The Hugging Face hub did not take what was uploaded; what is on this disk stays as it is."""


class KernelWarning(UserWarning):
    """A kernel of ours is wrong, fails or is slow on this machine and was switched off; results stay right."""
