"""The structs of XLA's C interface to custom calls (xla/ffi/api/c_api.h in jaxlib) for ctypes, as far as they are read.
XLA may append fields, it does not move them."""

from __future__ import annotations

import ctypes


class _Struct(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]


class Buffer(_Struct):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_void_p),
    ]


_DATA = Buffer.data.offset


class Arguments(_Struct):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("items", ctypes.c_void_p),  # to pointers to Buffer
    ]

    def addresses(self) -> list[int]:
        """Where each buffer's data is. It reads memory as numbers: an object a field would cost more than the rest of
        the call."""
        if not self.size:
            return []
        buffers = (ctypes.c_size_t * self.size).from_address(self.items)
        return [ctypes.c_size_t.from_address(buffer + _DATA).value for buffer in buffers]


class Scalar(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("value", ctypes.POINTER(ctypes.c_int64))]


class Attributes(_Struct):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.POINTER(Scalar))),
    ]


class Version(_Struct):
    _fields_ = [
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]


class Api(_Struct):
    _fields_ = [
        ("version", Version),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
        ("error_message", ctypes.c_void_p),
        ("error_destroy", ctypes.c_void_p),
        ("handler_register", ctypes.c_void_p),
        ("stream_get", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
    ]


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32)]


class Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(Metadata)),
    ]


class Frame(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(Extension)),
        ("api", ctypes.POINTER(Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", Arguments),
        ("results", Arguments),
        ("attributes", Attributes),
    ]


class StreamArgs(_Struct):
    _fields_ = [
        ("context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


class ErrorArgs(_Struct):
    _fields_ = [
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    ]


HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Frame))
