"""The concrete proxy reads its caller's bytecode, and looks at the wrong instruction on Python 3.11 and later.

``ConcreteProxy.__bool__``, ``__len__``, ``__iter__`` and ``keys`` ask in which kind of instruction they were called:
a branch, an unpacking, a ``*`` or ``**`` call. They take instruction number ``f_lasti // 2``, which is right as long
as every instruction is two bytes long; since 3.11 inline caches lie between the instructions, and the jumps have
other names. Here the instruction is found by its offset.

CPython accepts nothing but a bool from ``__bool__``, so the real value is returned wherever the call comes from;
upstream returns a proxy in other places, which can only end in a TypeError.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType
from typing import Any

from nni_plugins.compat.hook import Patch

JUMPS = ("POP_JUMP", "JUMP_IF")
UNPACKING_CALLS = ("CALL_FUNCTION_EX", "BUILD_TUPLE_UNPACK_WITH_CALL", "LIST_EXTEND")


@functools.lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> tuple[dict[int, int], list[str]]:
    """Position of each bytecode offset among the code's instructions, and the instructions' names."""
    instructions = list(dis.get_instructions(code))
    return {instruction.offset: n for n, instruction in enumerate(instructions)}, [i.opname for i in instructions]


def _calling(frame: FrameType | None) -> tuple[str, str]:
    """Name of the instruction that `frame` executes, and of the one after it."""
    if frame is None:
        return "", ""
    position, names = _instructions(frame.f_code)
    current = position[frame.f_lasti]
    while names[current] == "EXTENDED_ARG":
        current += 1
    return names[current], names[current + 1] if current + 1 < len(names) else ""


def _probe(proxy_class: Any) -> bool:
    """Whether a proxy of a true value is taken for true in a branch that comes after some inline caches."""
    proxy = proxy_class.__new__(proxy_class)
    proxy.__dict__.update(value=True, node=None, tracer=None)
    # Each call and attribute look-up is followed by caches, so a count of instructions is far off after a few.
    len(str(sys.version)), len(str(sys.version)), len(str(sys.version)), len(str(sys.version))
    try:
        return bool(1 if proxy else 0)
    except Exception:
        return False


def _defect(module: Any) -> bool:
    return not _probe(module.ConcreteProxy)


def _mend(module: Any) -> None:
    proxy_class = module.ConcreteProxy
    unpack = module.ConcreteUnpackIterProxy
    # The builtins as they were before tracing replaced them.
    true, length, is_a, a_range = module._orig_bool, module._orig_len, module._orig_isinstance, module._orig_range
    get_frame = sys._getframe

    def __bool__(self: Any) -> bool:
        instruction, following = _calling(get_frame(1))
        if instruction == "UNARY_NOT" and not following.startswith(JUMPS):
            module._logger.warning(
                'please use the function patcher, or use "x = operator.not_(y)" instead of "x = not y",'
                "otherwise the traced graph may be wrong"
            )
        return true(self.value)

    def __len__(self: Any) -> Any:
        instruction, _ = _calling(get_frame(1))
        if instruction in UNPACKING_CALLS:
            return length(self.value)
        return self.tracer.create_proxy("call_function", length, (self,), {})

    def __iter__(self: Any) -> Any:
        instruction, following = _calling(get_frame(1))
        if instruction in UNPACKING_CALLS or instruction == "UNPACK_SEQUENCE":
            return unpack(self)
        if instruction == "GET_ITER" and following == "FOR_ITER" and is_a(self.value, a_range):
            return iter(self.value)
        return self.tracer.create_proxy("call_function", iter, (self,), {})

    def keys(self: Any) -> Any:
        instruction, _ = _calling(get_frame(1))
        if instruction in ("CALL_FUNCTION_EX", "DICT_MERGE"):
            return self.value.keys()
        return self.tracer.create_proxy("call_method", "keys", (self,), {})

    for method in (__bool__, __len__, __iter__, keys):
        setattr(proxy_class, method.__name__, method)


PATCH = Patch(
    name="proxy-bytecode",
    module="nni.common.concrete_trace_utils.concrete_proxy",
    mends="concrete_trace fails for a model with a condition on Python 3.11 and later "
    "('__bool__ should return bool', 'list index out of range')",
    defect=_defect,
    mend=_mend,
)
