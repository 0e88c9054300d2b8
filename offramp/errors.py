"""Every error offramp raises, by who must act.

OfframpError
├── OptionError        the caller: an argument or option makes no sense
├── InputError         the caller: a request does not fit the model
├── ModelError         whoever made the model
│   ├── CaptureError   it cannot become one ONNX graph with dynamic rows
│   └── CutError       its graph cannot be cut at these exits
├── DataError          whoever made the data: a data set, a checkpoint or a trace
├── BundleError        whoever made or copied the bundle
│   ├── CorruptError   a file is missing, truncated or altered
│   ├── VersionError   written by a newer offramp
│   └── CertificateError   there is none for the engines and the policy that run, or it makes no sense
├── BackendError       whoever runs the machine: a package, driver or GPU is missing
│   └── PlanError      the plan was built for another TensorRT or GPU
├── BuildError         TensorRT refused or was cancelled
├── RefusedError       whoever sends or sizes the load: a pool did not answer this request
│   ├── QueueFullError it holds as many rows as it may
│   ├── DeadlineError  the request's time was over before its answer was there
│   └── ClosedError    the pool was closed
├── ParityError        two implementations disagree beyond tolerance
└── StorageError       the disk: full, read-only, no permission

A message says what was being done, what was got, what was expected, and what mends it.
"""


class OfframpError(Exception):
    """Base of all errors raised on purpose; `except OfframpError` catches everything offramp means."""


class OptionError(OfframpError, ValueError):
    """An argument or a command-line option makes no sense."""


class InputError(OfframpError, ValueError):
    """A request does not fit the model: names, dtypes, shapes or values."""


class ModelError(OfframpError):
    """The model itself must change."""


class CaptureError(ModelError):
    """The model could not become one ONNX graph with a dynamic row axis."""


class CutError(ModelError):
    """The graph cannot be cut at the requested exits."""


class DataError(OfframpError, ValueError):
    """A data set, checkpoint or trace is missing or malformed."""


class BundleError(OfframpError):
    """The bundle must be exported or copied again."""


class CorruptError(BundleError):
    """A file of the bundle is missing, truncated or altered."""


class VersionError(BundleError):
    """The bundle was written by a newer offramp."""


class CertificateError(BundleError):
    """There is no certificate for the engines and the policy that run, or it is malformed: calibrate again."""


class BackendError(OfframpError):
    """This machine lacks a package, a driver or a GPU."""


class PlanError(BackendError):
    """A plan was built for another TensorRT version or another GPU."""


class BuildError(OfframpError):
    """TensorRT refused the graph, or the build was cancelled."""


class RefusedError(OfframpError):
    """A pool did not answer this request; the request itself may be fine."""


class QueueFullError(RefusedError):
    """The pool holds as many rows as it may."""


class DeadlineError(RefusedError):
    """The request's time was over before its answer was there."""


class ClosedError(RefusedError):
    """The pool was closed before the request was answered."""


class ParityError(OfframpError):
    """Two implementations of the same segment disagree beyond tolerance."""


class StorageError(OfframpError):
    """The disk is full, read-only, or not ours to write to."""
