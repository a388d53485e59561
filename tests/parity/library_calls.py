"""Find the calls of other libraries in a source file, and bind their arguments against the installed signatures.

Read, not run: imports are resolved for real, then the syntax tree is walked. A name keeps what it was given: an imported
object, an instance (`trainer = SFTTrainer(...)`, `model: PreTrainedModel`, `AutoModel....from_pretrained(...)`) or the
keys of a dict that is passed on with `**`. A keyword that a function takes through its own **kwargs must be one that
its source reads, its TypedDict lists, or a function in FORWARDS takes: an unknown keyword is a problem, never a pass.
Leaves out: attributes of instances that are set at run time (but a trainer's model is one), values, types.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import peft
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.auto_factory import _BaseAutoModelClass

LIBRARIES = {"transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
TypeAndName = tuple[type, str]
# Where **kwargs go on to, by the class that defines the method and the method's name. Classes: their constructor.
FORWARDS: dict[TypeAndName, list[Callable]] = {
    (_BaseAutoModelClass, "from_pretrained"): [PreTrainedModel.from_pretrained, LlamaConfig],
    (_BaseAutoModelClass, "from_config"): [PreTrainedModel._from_config],
    (transformers.AutoConfig, "for_model"): [LlamaConfig],
    (transformers.AutoConfig, "from_pretrained"): [transformers.PreTrainedConfig.from_pretrained, LlamaConfig],
    (transformers.AutoTokenizer, "from_pretrained"): [PreTrainedTokenizerFast.from_pretrained, PreTrainedTokenizerFast],
    (PreTrainedModel, "from_pretrained"): [LlamaConfig],
    (transformers.GenerationMixin, "generate"): [GenerationConfig, LlamaForCausalLM.forward],
    (peft.PeftModel, "forward"): [LlamaForCausalLM.forward],
    (peft.PeftModelForCausalLM, "forward"): [LlamaForCausalLM.forward],
    (peft.PeftModelForCausalLM, "generate"): [LlamaForCausalLM.generate, GenerationConfig, LlamaForCausalLM.forward],
}
OPEN = {"apply_chat_template"}  # its **kwargs are the template's own variables: any name is right
# What a call gives back, where neither a class nor a return annotation says it; one class stands for its family.
FAMILY = {
    "PreTrainedModel": LlamaForCausalLM,
    "AutoModelForCausalLM": LlamaForCausalLM,
    "PreTrainedTokenizerBase": PreTrainedTokenizerFast,
    "AutoTokenizer": PreTrainedTokenizerFast,
    "AutoConfig": LlamaConfig,
    "PeftModel": peft.PeftModelForCausalLM,
}


@dataclass(frozen=True)
class Instance:
    cls: type


@dataclass(frozen=True)
class Method:
    owner: type
    name: str


@dataclass(frozen=True)
class Keys:
    names: frozenset


@dataclass(frozen=True)
class Problem:
    line: int
    text: str


def instance(cls: type) -> Instance:
    return Instance(FAMILY.get(cls.__name__, cls))


def is_library(thing: Any) -> bool:
    """Whether a module, function or class belongs to a library, or is a class derived from one of theirs."""
    if inspect.isclass(thing):
        return any(c.__module__.split(".")[0] in LIBRARIES for c in thing.__mro__)
    name = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None) or ""
    return name.split(".")[0] in LIBRARIES


@cache
def read_keywords(function: Callable) -> frozenset:
    """Keywords that a function with **kwargs takes: named ones, TypedDict keys, and those its source reads."""
    try:
        parameters = inspect.signature(function).parameters.values()
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (TypeError, ValueError, OSError, SyntaxError):
        return frozenset()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in parameters:  # Unpack[TransformersKwargs]
        for typed in get_args(p.annotation) if p.kind is p.VAR_KEYWORD else ():
            names |= {key for c in typed.__mro__ for key in getattr(c, "__annotations__", {})}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(), attr="pop" | "get"), args=[ast.Constant(value=key), *_]):
                names.add(key)
            case ast.Subscript(value=ast.Name(), slice=ast.Constant(value=key)):
                names.add(key)
            case ast.Compare(left=ast.Constant(value=key), ops=[ast.In() | ast.NotIn()]):
                names.add(key)
    return frozenset(name for name in names if isinstance(name, str))


def known_keywords(function: Callable, owner: type | None = None, name: str = "") -> frozenset:
    """`read_keywords` of a function, or of every constructor of a class, and of what it forwards to."""
    if inspect.isclass(function):
        makers = [vars(c)[m] for c in function.__mro__[:-1] for m in ("__init__", "__post_init__") if m in vars(c)]
        special = getattr(function, "SPECIAL_TOKENS_ATTRIBUTES", ())  # of tokenizers: set in a loop over the names
        return frozenset(inspect.signature(function).parameters).union(special, *map(read_keywords, makers))
    forwards = [f for (cls, method), f in FORWARDS.items() if owner and method == name and issubclass(owner, cls)]
    return read_keywords(function).union(*(known_keywords(f) for more in forwards for f in more))


@cache
def set_at_run_time(cls: type) -> frozenset:
    """Attributes that a class, or one that it is derived from, gives its instances: `self.name = ...` in any method."""
    names = set()
    for each in cls.__mro__:
        if is_library(each) and each.__module__ != __name__:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
            names |= {
                node.attr for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name) and node.value.id == "self"
            }  # fmt: skip
    return frozenset(names)


def signature_of(function: Callable) -> inspect.Signature:
    """`inspect.signature`, also of auto classes' methods: copies that name a *bound* method as what they wrap."""
    if inspect.ismethod(function) and inspect.ismethod(getattr(function.__func__, "__wrapped__", None)):
        whole = inspect.signature(function.__func__, follow_wrapped=False)
        return whole.replace(parameters=list(whole.parameters.values())[1:])
    return inspect.signature(function)


def patched_keywords(function: Callable) -> set[str]:
    """Parameters of the functions defined inside `function`: a patch of `forward` adds them (TRL's fused head)."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    inner = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {arg.arg for node in inner for arg in [*node.args.args, *node.args.kwonlyargs]}


class Checker(ast.NodeVisitor):
    """Walks one file; afterwards `problems` holds what does not fit, `checked` the names of all calls that were bound."""

    def __init__(self, lesson: bool = False):
        self.lesson = lesson
        self.scopes: list[dict[str, Any]] = [{}]
        self.bases: list[type] = []
        self.problems: list[Problem] = []
        self.checked: list[str] = []
        self.extra: set[str] = set()

    def problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(Problem(node.lineno, text))

    # names and what they hold
    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.split(".")[0]
            if root in LIBRARIES or root == "finetune_lab":
                try:
                    module = importlib.import_module(alias.name)
                except ImportError:
                    self.problem(node, f"no module {alias.name}")
                    continue
                self.scopes[-1][alias.asname or root] = module if alias.asname else importlib.import_module(root)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] not in {*LIBRARIES, "finetune_lab"}:
            return
        for alias in node.names:
            try:
                thing = getattr(importlib.import_module(node.module), alias.name, None)
                thing = thing or importlib.import_module(f"{node.module}.{alias.name}")
            except ImportError:
                self.problem(node, f"{node.module} has no {alias.name}")
                continue
            self.scopes[-1][alias.asname or alias.name] = thing
            if alias.name == "add_fused_lm_head":
                self.extra |= patched_keywords(thing)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for expression in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(expression)
        scope = {arg.arg: None for arg in (node.args.vararg, node.args.kwarg) if arg}
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            cls = self.resolve(arg.annotation) if arg.annotation else None
            scope[arg.arg] = instance(cls) if inspect.isclass(cls) and is_library(cls) else None
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = tuple(b for b in map(self.resolve, node.bases) if inspect.isclass(b) and is_library(b))
        defined = {f.name: (lambda *a, **k: None) for f in node.body if isinstance(f, ast.FunctionDef)}
        if bases:
            if any(issubclass(b, transformers.TrainerCallback) for b in bases):
                for name in defined:
                    if name.startswith("on_") and not any(hasattr(b, name) for b in bases):
                        self.problem(node, f"{node.name}.{name} is no event of {bases[0].__name__}")
            self.scopes[-1][node.name] = type(node.name, bases, defined)
        self.bases.append(type(node.name, bases, {}) if bases else object)
        for statement in node.body:
            self.visit(statement)
        self.bases.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        value = self.resolve(node.value)
        for target in node.targets:
            self.give(target, value)

    def visit_Try(self, node: ast.Try) -> None:
        before = len(self.problems)
        for statement in node.body:
            self.visit(statement)
        caught = {name.id for h in node.handlers if h.type for name in ast.walk(h.type) if isinstance(name, ast.Name)}
        if self.lesson and caught & {"TypeError", "ImportError", "AttributeError"}:
            del self.problems[before:]  # shown because it is broken: the cell is run, and its output is the error
        for statement in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(statement)

    def visit_For(self, node: ast.For) -> None:
        self.give(node.target, None)
        self.generic_visit(node)

    def give(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = value
        elif isinstance(target, ast.Tuple):
            values = value if isinstance(value, tuple) else [None] * len(target.elts)
            for one, part in zip(target.elts, values, strict=False):
                self.give(one, part)

    def resolve(self, node: ast.expr) -> Any:
        """What an expression is: object, Instance, Method, Keys, a tuple of them, or None where it cannot be told."""
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
            case ast.Attribute(value=inner, attr=name):
                base = self.resolve(inner)
                if isinstance(base, Instance):
                    if name == "model" and issubclass(base.cls, transformers.Trainer):
                        return Instance(LlamaForCausalLM)
                    known = inspect.getattr_static(base.cls, name, None) is not None
                    return None if not known and name in set_at_run_time(base.cls) else Method(base.cls, name)
                return getattr(base, name, None) if inspect.ismodule(base) or inspect.isclass(base) else None
            case ast.Call(func=ast.Name(id="super"), args=[]) if self.bases and self.bases[-1] is not object:
                return Instance(self.bases[-1])
            case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
                return Keys(frozenset(k.arg for k in keywords if k.arg))
            case ast.Dict(keys=keys):
                return Keys(frozenset(k.value for k in keys if isinstance(k, ast.Constant)))
            case ast.Tuple(elts=parts):
                return tuple(map(self.resolve, parts))
            case ast.Call(func=func):
                return self.returned(func)
        return None

    def returned(self, func: ast.expr) -> Any:
        thing = self.resolve(func)
        if inspect.isclass(thing):
            return instance(thing) if is_library(thing) else None
        if isinstance(func, ast.Attribute) and func.attr in ("from_pretrained", "from_config"):
            owner = self.resolve(func.value)
            return instance(owner) if inspect.isclass(owner) else None
        name = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__name__', '')}"
        if name == "finetune_lab.lab.models.load":
            return instance(PreTrainedModel), Instance(PreTrainedTokenizerFast)
        if name == "peft.mapping_func.get_peft_model" or name == "finetune_lab.lab.train.add_lora":
            return Instance(peft.PeftModelForCausalLM)
        if isinstance(thing, Method):
            thing = getattr(thing.owner, thing.name, None)
        says = inspect.signature(thing).return_annotation if inspect.isroutine(thing) and is_library(thing) else None
        says = getattr(thing, "__globals__", {}).get(says) if isinstance(says, str) else says
        return instance(says) if inspect.isclass(says) and is_library(says) else None

    # calls
    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.IfExp):  # (KTOTrainer if kto else DPOTrainer)(...): both must fit
            for func in (node.func.body, node.func.orelse):
                self.visit_Call(ast.copy_location(ast.Call(func, node.args, node.keywords), node))
            return
        self.generic_visit(node)
        thing = self.resolve(node.func)
        if isinstance(thing, Instance):  # model(...): PyTorch calls forward
            name = "forward" if hasattr(thing.cls, "forward") else "__call__"
            thing = Method(thing.cls, name)
        if isinstance(thing, Method):
            self.check_method(node, thing)
        elif thing is None and isinstance(node.func, ast.Attribute):
            base = self.resolve(node.func.value)
            if (inspect.ismodule(base) or inspect.isclass(base)) and is_library(base):
                self.problem(node, f"{base.__name__} has no {node.func.attr}")
        elif callable(thing) and is_library(thing):
            owner = self.resolve(node.func.value) if isinstance(node.func, ast.Attribute) else None
            self.bind(node, thing, owner if inspect.isclass(owner) else None)

    def check_method(self, node: ast.Call, method: Method) -> None:
        if not is_library(method.owner):
            return
        kind = inspect.getattr_static(method.owner, method.name, None)
        if kind is None:
            if not hasattr(method.owner, "__getattr__"):  # a module finds its children at run time
                self.problem(node, f"{method.owner.__name__} has no {method.name}")
        elif inspect.isfunction(kind) or isinstance(kind, staticmethod | classmethod):
            self.bind(node, getattr(method.owner, method.name), method.owner, drop=inspect.isfunction(kind))

    def bind(self, node: ast.Call, function: Callable, owner: type | None, drop: bool = False) -> None:
        name = f"{owner.__name__}.{function.__name__}" if owner else function.__name__
        try:
            signature = signature_of(function)
        except (TypeError, ValueError):
            return  # built into C
        self.checked.append(f"{(owner or function).__module__.split('.')[0]}:{name}")
        keywords = {k.arg for k in node.keywords if k.arg}
        splats = [self.resolve(k.value) for k in node.keywords if not k.arg]
        keywords |= {key for keys in splats if isinstance(keys, Keys) for key in keys.names}
        loose = len(splats) > 0 or any(isinstance(a, ast.Starred) for a in node.args)
        given = [None] * (drop + sum(not isinstance(a, ast.Starred) for a in node.args))
        if function.__name__ == "forward":
            keywords -= self.extra
        if inspect.isclass(function) and issubclass(function, transformers.PreTrainedConfig):
            keywords -= known_keywords(function)  # __post_init__ takes more than the fields
        try:
            (signature.bind_partial if loose else signature.bind)(*given, **dict.fromkeys(keywords))
        except TypeError as error:
            self.problem(node, f"{name}: {error}")
            return
        if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) and function.__name__ not in OPEN:
            for keyword in sorted(keywords - known_keywords(function, owner, function.__name__)):
                self.problem(node, f"{name}: **kwargs with an unknown keyword '{keyword}'")


def check(source: str, lesson: bool = False) -> Checker:
    """Walk one file of Python. lesson: a percent script, where `try ... except TypeError` may show a broken call."""
    checker = Checker(lesson)
    checker.visit(ast.parse(source))
    return checker


def problems(source: str) -> Iterator[str]:
    yield from (found.text for found in check(source).problems)
