"""A policy on one root module: the state of each forward pass, and the choices for its layers."""

import contextlib
import copy
import gc
import inspect
import itertools
import operator
import secrets
import sys
import threading
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..functional import keep_top_p, route, select_experts
from ..nn import DirectPolicy, RoutedExperts, Tensors
from ..ops import library
from .cache import PROMPT, Key, Memory, cache_in
from .policy import Routing, RoutingPolicy, block_numbers, energy_shares, log_evidence, router_energies, running_sums
from .tokens import Tokens

if TYPE_CHECKING:
    from .override import Override

__all__ = ["LayerPolicy", "RootRouting"]


_SCOPES = {"token": 0, "causal": 1, "sequence": 2, "prompt": 2, "window": 2}  # as the operator `evidence` numbers them


class _HasVoted(Exception):
    """Ends the base's pass over a prompt after the blocks that determine the choice."""


class LayerPolicy(DirectPolicy):
    """The `router_policy` of a SMILE layer: the policy of its root, with the layer's number `index` there.

    `before` is its number of experts per token in passes that began before it had a policy.
    """

    def __init__(self, root: "RootRouting", index: int, before: int):
        self.root, self.index, self.before = root, index, before

    def __call__(self, layer: RoutedExperts, x: Tensor) -> Routing | None:
        """(weights, ids) [..., m] for x [..., D]; None: the layer routes itself."""
        root = self.root
        state = getattr(root.current, "state", None)
        if state is None:
            if root.began_before():
                return _route_alone(layer, x, self.before)
            recomputed = bool(root.live) and _backward_pass() != -1
            override = root.override
            if root.policy.is_alone and not recomputed and (override is None or override.rows is None):
                own = _route_alone(layer, x, layer.num_experts_per_tok, root.policy.top_p)
                return own if override is None else override.routing(layer, x, own, None)
        at = state or root.passed()
        if at.policy.is_alone and at.override is None:
            return at.route_alone(layer, x)
        return at.replay(self.index, x) if state is None else at.choose(self.index, layer, x)

    def output(self, layer: RoutedExperts, x: Tensor, tensors: Tensors) -> Tensor | None:
        """The output [..., O] of a layer with these tensors, in inference; None: it is called for its choice."""
        state = getattr(self.root.current, "state", None)
        return None if state is None or not state.is_direct else state.output(self.index, layer, x, tensors)


def _route_alone(layer: RoutedExperts, x: Tensor, num_experts_per_tok: int, top_p: float = 1.0) -> Routing | None:
    """The published routing to this number of experts; None if the layer can compute it itself."""
    if num_experts_per_tok == layer.num_experts_per_tok and top_p == 1:
        return None
    rows, g = layer.vh if layer.router is None else layer.router, layer.rank_of_router
    choice = route(x.to(rows.dtype), rows, num_experts_per_tok=num_experts_per_tok, rank_of_router=g)
    return keep_top_p(*choice, top_p)


class RootRouting:
    """A policy on one root module, with a state for each forward pass.

    `policy` may be replaced at any time: a pass uses the one it began with. Each has a random number, which a KV cache
    stores with its sums, also in a file. `caller` is a model that embeds its ids, and images or sounds among them, and
    calls the root with the result: `restart_at` is found in its ids.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        root: nn.Module,
        layers: Sequence[tuple[str, RoutedExperts]],
        caller: nn.Module | None = None,
    ):
        self.plan = policy, secrets.randbits(62)
        self.root_name = type(root).__name__
        self.users = len(layers)
        blocks = block_numbers(name for name, _ in layers)
        self.blocks = [blocks[name] for name, _ in layers]
        self.argument_names = tuple(inspect.signature(root.forward).parameters)
        self.takes_cache = any("cache" in name or "past" in name for name in self.argument_names)
        self._forget()
        self.handles: tuple[torch.utils.hooks.RemovableHandle, ...] = ()
        for index, (_, layer) in enumerate(layers):
            layer.router_policy = LayerPolicy(self, index, layer.num_experts_per_tok)
        # Last: a pass that these hooks see begin finds the policy on every layer.
        self.handles = (
            root.register_forward_pre_hook(self._open, with_kwargs=True),
            root.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        )
        if caller is not None:
            self.handles += (
                caller.register_forward_pre_hook(self._note_ids, with_kwargs=True),
                caller.register_forward_hook(self._forget_ids, with_kwargs=True, always_call=True),
            )

    def _forget(self) -> None:
        self.current = threading.local()  # .state: the forward pass this thread is in; .override: what it asks for
        self.overriding = 0  # overrides that are open, in any thread
        self.live: weakref.WeakSet[ForwardPass] = weakref.WeakSet()  # passes whose graphs exist
        self.replayed: weakref.WeakValueDictionary[int, ForwardPass] = weakref.WeakValueDictionary()  # by backward pass

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the model start without running passes.
        return {k: v for k, v in self.__dict__.items() if k not in ("current", "overriding", "live", "replayed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def policy(self) -> RoutingPolicy:
        return self.plan[0]

    @property
    def override(self) -> "Override | None":
        """The experts requested by this thread."""
        return getattr(self.current, "override", None)

    @override.setter
    def override(self, override: "Override | None") -> None:
        self.current.override = override

    @property
    def is_idle(self) -> bool:
        """Whether the layers could do without this: published routing, no override open, no pass that needs one."""
        return self.policy.is_published and not (self.overriding or self.live or self.is_running())

    def is_on(self, root: nn.Module, layers: int) -> bool:
        """Whether this is at work on `root` itself, and on as many layers."""
        return self.users == layers and self.handles[0].id in root._forward_pre_hooks

    def follow(self, policy: RoutingPolicy) -> None:
        """Use `policy` in passes that begin from now on."""
        self.plan = policy, secrets.randbits(62)

    def release(self, layer: RoutedExperts) -> None:
        """Detaches `layer`; the last one removes the hooks."""
        layer.router_policy = None
        self.users -= 1
        if self.users == 0:
            for handle in self.handles:
                handle.remove()

    def _note_ids(self, caller: nn.Module, args: tuple, kwargs: dict) -> None:
        names = inspect.signature(caller.forward).parameters
        self.current.ids = (dict(zip(names, args)) | kwargs).get("input_ids")

    def _forget_ids(self, caller: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.current.ids = None

    def _open(self, root: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = dict(zip(self.argument_names, args)) | kwargs
        ids, embedded = getattr(self.current, "ids", None), arguments.get("inputs_embeds")
        if ids is not None and embedded is not None and ids.shape == embedded.shape[:2]:
            arguments["input_ids"] = ids
        self.current.seen = True
        state = self.current.state = ForwardPass(self, arguments)
        if state.policy.scope == "prompt" and not state.held:
            state.vote(root, args, kwargs)

    def _close(self, root: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        state, self.current.state = getattr(self.current, "state", None), None
        if state is None or output is None:  # the pass has failed
            return
        state.keep(output)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._expect_recomputation(state, output)

    def _expect_recomputation(self, state: "ForwardPass", output: Any) -> None:
        """Gradient checkpointing calls layers again in the backward pass, after their forward pass has ended.

        The hooks on the root's outputs keep its state as long as the graph lives, and tell which pass a backward pass
        has reached: autograd finishes a later forward pass before it enters an earlier one.
        """

        def reached(_: Tensor, state: ForwardPass = state) -> None:
            task = _backward_pass()
            other = self.replayed.get(task)
            if other not in (None, state) and len(state.devices) > 1:
                raise RuntimeError(
                    f"routing: one backward pass runs through two forward passes of {self.root_name}, which spans "
                    "several devices; expected one forward pass, so that recomputed layers find their routing"
                )
            self.replayed[task] = state

        if not hasattr(torch._C, "_current_graph_task_id"):
            return
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(reached)
                self.live.add(state)

    def passed(self) -> "ForwardPass":
        """The forward pass that a layer called outside of one is recomputed for."""
        task = _backward_pass()
        if task == -1:
            rule = f"policy {self.policy}" if self.override is None else "override"
            raise RuntimeError(
                f"routing: a SMILE layer was called outside of a forward pass of {self.root_name}, whose {rule} "
                f"needs the whole pass; call the {self.root_name}, or set_routing on the part you call"
            )
        state = self.replayed.get(task)
        if state is None and len(self.live) == 1:
            (state,) = self.live
        if state is None:
            raise RuntimeError(
                f"routing: a SMILE layer is recomputed for one of {len(self.live)} forward passes of {self.root_name}, "
                "and which one is unknown; call backward before the next forward pass"
            )
        return state

    def began_before(self) -> bool:
        """Whether this thread is inside a call of the root that began before it had a policy."""
        return not self.handles or (not getattr(self.current, "seen", False) and self._calls(threading.get_ident()))

    def is_running(self) -> bool:
        """Whether any thread is inside a call of the root."""
        with _no_collection():
            threads = list(sys._current_frames())
        return any(self._calls(thread) for thread in threads)

    def _calls(self, thread: int) -> bool:
        """Whether a call of the root is on a thread's stack."""
        for frame in _stack_of(thread):
            root = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
            if isinstance(root, nn.Module) and self.handles[0].id in root._forward_pre_hooks:
                return True
        return False


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: in sys._current_frames, Python 3.11 holds a lock that the end of a thread-local takes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stack_of(thread: int) -> list[types.FrameType]:
    """The frames of a thread, the innermost first; [] if it has ended.

    They are collected inside one call of C, so that the thread cannot run meanwhile: `f_back` of a generator that has
    yielded since can be a freed frame (Python 3.11).
    """
    frames: list[Any] = []
    innermost = map(operator.itemgetter(thread), itertools.starmap(sys._current_frames, [()]))
    # At the end, None.f_back; a thread that has ended.
    with _no_collection(), contextlib.suppress(AttributeError, KeyError):
        frames.extend(itertools.accumulate(itertools.chain(innermost, itertools.repeat("f_back")), getattr))
    return frames[:-1]


def _backward_pass() -> int:
    """The number of the backward pass this thread is in, -1 outside of one.

    Raises:
        NotImplementedError: this PyTorch does not tell.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    if current is None:
        raise NotImplementedError(
            f"routing: a SMILE layer was called outside of a forward pass, and PyTorch {torch.__version__} does not "
            "tell which backward pass it is recomputed for; expected 2.10 to 2.13, or no gradient checkpointing"
        )
    return current()


class ForwardPass:
    """The state of one forward pass: evidence so far, the last choice, and data stored with a KV cache."""

    def __init__(self, root: RootRouting, arguments: dict[str, Any]):
        self.policy, serial = root.plan
        self.root_name, self.blocks = root.root_name, root.blocks
        self.override = root.override
        self.memory: Memory | None = None
        self.held = self.voting = False  # whether the prompt has voted in an earlier pass, or the base reads it now
        self.calls: dict[int, int] = {}  # layer -> how often it has run
        self.choices: dict[int, Routing] = {}
        self.spread: tuple[Tensor, torch.Size, torch.device, Routing] | None = None  # a choice's ids, for which input
        self.devices: set[torch.device] = set()
        self.is_direct = False  # whether layers are computed without being called for a choice, in inference
        if self.policy.is_alone and (self.override is None or self.override.rows is None):
            return  # nothing depends on whose tokens there are
        self.tokens = Tokens(arguments, self.policy, self.root_name)
        creates_one = root.takes_cache and arguments.get("use_cache") is not False
        caches = creates_one or self.tokens.cache is not None
        if self.policy.scope not in ("token", "window") and self.tokens.starts is None and caches:
            self.memory = Memory.beside(self.tokens, serial, self.root_name)
        self.held = self.memory is not None and len(self.memory.choices) > 0
        self.pools = self.policy.scope in ("sequence", "prompt") and self.tokens.starts is None
        self.evidence: Tensor | None = None  # L, [B, 1 or S, N]
        self.choice: Routing | None = None  # of the last scored layer, [B, 1 or S, m]
        if self.policy.scope != "token" and not self.held:
            history = None
            if self.policy.restart_at is not None and self.memory is not None and self.policy.scope == "causal":
                count = len(self.policy.restart_at) - 1
                history = self.memory.history(self.tokens.ids, count, self.tokens.past)
            self.tokens.find_factors(history)
        plain = self.tokens.starts is None and self.tokens.encoder_states is None and isinstance(self.tokens.past, int)
        one_step = self.policy.scope != "prompt" and self.policy.top_p == 1 and plain
        # Steps of one operator write sums into buffers, which vmap and the other transforms do not see.
        aside = self.override is not None or torch.compiler.is_compiling()
        aside = aside or torch._C._functorch.peek_interpreter_stack() is not None
        self.is_direct = (self.held or one_step) and not aside

    def route_alone(self, layer: RoutedExperts, x: Tensor) -> Routing | None:
        """The published routing of a layer; None: it does so by itself."""
        m = self.policy.num_experts_per_tok or layer.own_num_experts_per_tok()
        return _route_alone(layer, x, m, self.policy.top_p)

    def choose(self, index: int, layer: RoutedExperts, x: Tensor) -> Routing:
        """(weights, ids) [..., m] for the input x [..., D] of layer `index`, which runs now."""
        key = (index, self.calls.get(index, 0))
        self.calls[index] = key[1] + 1
        own = self.route_alone(layer, x) if self.policy.is_alone else self._choose(key, layer, x)
        if self.override is None or self.voting:
            assert own is not None
            return own
        tokens = None if self.override.rows is None else self.tokens
        with torch.no_grad():
            self.choices[index] = choice = self.override.routing(layer, x, own, tokens)
        self.devices.add(x.device)
        return choice

    def _choose(self, key: Key, layer: RoutedExperts, x: Tensor) -> Routing:
        """The policy's choice."""
        policy, index, scores = self.policy, key[0], self._scores(key)
        if self.voting:
            if scores:
                self.choice = self._score(key, layer, x)
            elif not torch.compiler.is_compiling():
                raise _HasVoted
            off = x.new_zeros((*x.shape[:-1], 0), dtype=torch.float32)
            return off, off.int()
        with torch.no_grad():
            if self._is_single(x):
                choice = self._choose_for_sequence(layer, x, scores)
            else:
                if scores and not self.held and policy.scope != "prompt":  # whose choice is made
                    self._remember(key, self._score(key, layer, x))
                choice = self._earlier_choice(key)
        self.choices[index] = choice
        self.devices.add(x.device)
        return self._spread(choice, x)

    def _is_single(self, x: Tensor) -> bool:
        """Whether x has one row for all the tokens of a sequence, as a pooler's, in scope "window"."""
        several = self.policy.scope == "window" and self.tokens.length not in (None, 1)
        return several and self.tokens.shape(x)[1] == 1

    def _choose_for_sequence(self, layer: RoutedExperts, x: Tensor, scores: bool) -> Routing:
        """The choice [B, 1, m] of such a layer: by the mean evidence of the tokens, and its own if it scores.

        Other layers do not see it.
        """
        policy = self.policy
        m = policy.num_experts_per_tok or layer.own_num_experts_per_tok()
        logs = None if self.evidence is None else self.tokens.mean(self.evidence)
        if scores:
            router = layer.vh if layer.router is None else layer.router
            energies = router_energies(x.detach().to(router.dtype), router[:, : layer.rank_of_router])
            shares = energy_shares(energies).view(-1, 1, layer.num_local_experts)
            own = log_evidence(shares, policy.accumulate, layer.router_prior if policy.calibrated else None)
            logs = own if logs is None or not policy.accumulate else logs.to(own.device) + own
        assert logs is not None
        return select_experts(logs, m, policy.top_p)

    def _scores(self, key: Key) -> bool:
        """Whether a layer is in a block before the lock."""
        lock = self.policy.lock_after
        return lock is None or self.blocks[key[0]] + key[1] * (self.blocks[-1] + 1) < lock

    def output(self, index: int, layer: RoutedExperts, x: Tensor, tensors: Tensors) -> Tensor | None:
        """The output of layer `index`, which is then not called for its choice; None: not supported."""
        policy, key = self.policy, (index, self.calls.get(index, 0))
        if policy.scope == "window" and self._is_single(x):
            return None
        if not self.held and (policy.lock_after is None or self._scores(key)):
            y = self._output_of_step(key, layer, x, tensors)
        else:
            choice = self._earlier_choice(key)
            y = library.serve(x, tensors, choice[1].shape[-1], layer.rank_of_router, self._spread(choice, x))
        if y is not None:
            assert self.choice is not None
            self.calls[index], self.choices[index] = key[1] + 1, self.choice
            self.devices.add(x.device)
        return y

    def _earlier_choice(self, key: Key) -> Routing:
        """The choice of an earlier pass, or of the last layer that scored in this one."""
        if self.held and self.memory is not None:
            self.choice = self.memory.choice(key, locked=self.policy.lock_after is not None)
        assert self.choice is not None
        return self.choice

    def _output_of_step(self, key: Key, layer: RoutedExperts, x: Tensor, tensors: Tensors) -> Tensor | None:
        """The output of a layer that chooses now, by one operator for its step and its product; None: not supported."""
        policy, tokens = self.policy, self.tokens
        batch, length = tokens.shape(x)
        sums, past, factors = None, tokens.past, tokens.last_votes(length) if self.pools else tokens.factors
        if self.memory is not None and policy.scope == "causal":
            sums = self.memory.running(key, (batch, length, layer.num_local_experts), past, tensors[3])
        prior = layer._buffers["router_prior"] if policy.calibrated else None  # an attribute would take longer
        real = None if tokens.real is None else tokens.real_of(x)
        below = self.evidence if policy.accumulate else None
        m = policy.num_experts_per_tok or layer.own_num_experts_per_tok()
        options = m, layer.rank_of_router, batch, _SCOPES[policy.scope] + (policy.window or 0), policy.accumulate
        step = library.serve_step(x, tensors, prior, real, factors, sums, past, below, *options)
        if step is None:
            return None
        y, weights, ids, self.evidence = step
        self._remember(key, (weights, ids))
        return y

    def _remember(self, key: Key, choice: Routing) -> None:
        """Keep a choice for the layers after the lock, and that of a sequence for later passes."""
        self.choice = choice
        if self.memory is not None and self.policy.scope == "sequence":
            self.memory.choices[key], self.memory.last = choice, key

    def vote(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The base reads the prompt, all experts off, and the evidence of its layers chooses for the answer."""
        if self.tokens.starts is not None:
            raise NotImplementedError(
                "routing: sequences that are packed in a row have no prompt of their own; expected scope 'sequence' or "
                "'causal'"
            )
        if self.tokens.cache is not None:  # a copy of the cache, which is empty, is filled and thrown away
            streams = {id(part): part for part in vars(self.tokens.cache).values() if isinstance(part, torch.Stream)}
            again = copy.deepcopy(self.tokens.cache, streams)  # those of an offloaded cache cannot be copied
            args = tuple(again if value is self.tokens.cache else value for value in args)
            kwargs = {name: again if value is self.tokens.cache else value for name, value in kwargs.items()}
        self.voting = True
        try:
            with torch.no_grad():
                root.forward(*args, **kwargs)
        except _HasVoted:
            pass
        self.voting = False
        if self.choice is None:
            raise RuntimeError(f"routing: no SMILE layer of {self.root_name} has run on the prompt; expected some")
        self.calls = {}
        if self.memory is not None:
            self.memory.choices[PROMPT], self.memory.last = self.choice, PROMPT

    def replay(self, index: int, x: Tensor) -> Routing:
        """The choice of layer `index` once more, for a recomputation of its forward pass."""
        if self.calls.get(index) != 1:
            raise RuntimeError(
                f"routing: a layer that ran {self.calls.get(index, 0)} times in a forward pass of {self.root_name} is "
                "recomputed in the backward pass; expected one run, otherwise its routing is unknown"
            )
        return self._spread(self.choices[index], x)

    def keep(self, output: Any) -> None:
        """Store the data for later passes with the KV cache that they will use."""
        if self.memory is not None:
            cache = self.tokens.cache if self.tokens.cache is not None else cache_in(output)
            if cache is not None:
                self.memory.attach(cache)
                if isinstance(self.tokens.past, int):
                    self.memory.length = self.tokens.past + (self.tokens.length or 0)

    def _score(self, key: Key, layer: RoutedExperts, x: Tensor) -> Routing:
        """The choice at a layer that runs now; its evidence L is kept for those above."""
        tokens, policy = self.tokens, self.policy
        m = policy.num_experts_per_tok or layer.own_num_experts_per_tok()
        prior = layer.router_prior if policy.calibrated else None
        batch, length = tokens.shape(x)
        below = self.evidence if policy.accumulate else None
        if policy.accumulate and not self.pools and tokens.is_encoders(x):
            raise RuntimeError(
                f"routing: a SMILE layer of {self.root_name} reads the encoder's output, whose tokens are others than "
                "the decoder's; expected scope 'sequence', or accumulate=False"
            )
        rows = 1 if self.pools else length
        if below is not None and below.shape != (batch, rows, layer.num_local_experts):
            raise RuntimeError(
                f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)} after layers with evidence "
                f"{list(below.shape)}; expected the same tokens at every layer"
            )
        router, g = layer.vh if layer.router is None else layer.router, layer.rank_of_router
        # Autocast leaves some inputs in another dtype than the parameters: the router works in the latter.
        inputs, real = x.detach().to(router.dtype), tokens.real_of(x)
        if tokens.starts is None and batch > 0:
            factors = tokens.last_votes(length) if self.pools else tokens.factors
            before = None
            if policy.scope == "causal" and self.memory is not None:
                before = self.memory.before(key, batch, tokens.past)
            options = (m, g, batch, _SCOPES[policy.scope] + (policy.window or 0), policy.accumulate)
            step = library.evidence(inputs, router, prior, real, factors, before, below, *options)
            if step is not None:
                weights, ids, self.evidence, sums = step
                if policy.scope == "causal" and self.memory is not None:
                    self.memory.write(key, sums, tokens.past)
                return keep_top_p(weights, ids, policy.top_p)
        shares = energy_shares(router_energies(inputs, router[:, :g])).view(batch, length, layer.num_local_experts)
        if real is not None:
            shares = torch.where(real[..., None].to(shares.device), shares, 0)
        logs = log_evidence(self._pool(key, shares), policy.accumulate, prior)
        if below is not None:
            logs = logs + below.to(logs.device)
            logs = logs - logs.amax(-1, keepdim=True)  # the softmax does not see it; sums over many layers stay exact
        self.evidence = logs
        return select_experts(logs, m, policy.top_p)

    def _pool(self, key: Key, shares: Tensor) -> Tensor:
        """S of shares [B, S, N] over each token's scope: [B, 1, N] for whole sequences, else [B, S, N].

        Sums serve for means: their quotient is the same for all experts.
        """
        tokens, scope = self.tokens, self.policy.scope
        if scope == "token":
            return shares
        width = 0 if self.policy.window is None else min(self.policy.window, shares.shape[1])
        if scope == "window" and (tokens.starts is None or shares.shape[1] != tokens.length):
            return F.pad(shares, (0, 0, width, width)).unfold(1, 2 * width + 1, 1).sum(-1)
        if self.pools:
            votes = tokens.last_votes(shares.shape[1])
            if votes is not None:
                shares = shares * votes[..., None].to(shares.device, shares.dtype)
            return shares.sum(1, keepdim=True)
        if (
            tokens.starts is not None
            and tokens.ends is not None
            and tokens.factors is None
            and shares.shape[1] == tokens.length
        ):
            # Differences of prefix sums, in float64, so that a short sequence after long ones is accurate.
            starts, ends = tokens.starts.to(shares.device), tokens.ends.to(shares.device)
            prefix = F.pad(shares.double().cumsum(1), (0, 0, 1, 0))
            at = torch.arange(tokens.length, device=starts.device)[None]
            to = ends + 1 if scope == "sequence" else at + 1
            if scope == "window":
                starts, to = torch.maximum(starts, at - width), torch.minimum(ends, at + width) + 1
            from_, to = (t.expand(len(shares), -1)[..., None].expand_as(shares) for t in (starts, to))
            return (prefix.gather(1, to) - prefix.gather(1, from_)).to(shares.dtype)
        factors = None if tokens.factors is None else tokens.factors.to(shares.device)
        if self.memory is None:
            sums = running_sums(shares, factors)
            if scope == "sequence" and tokens.ends is not None:
                ends = tokens.ends.to(shares.device).expand(len(shares), -1)
                sums = sums.gather(1, ends[..., None].expand_as(shares))
            return sums
        sums = running_sums(shares, factors, self.memory.before(key, len(shares), tokens.past))
        self.memory.write(key, sums, tokens.past)
        return sums

    def _spread(self, choice: Routing, x: Tensor) -> Routing:
        """One choice a sequence, or a token, as one for each row of x."""
        leading, device, known = x.shape[:-1], x.device, self.spread
        if known is not None and known[0] is choice[1] and known[1] == leading and known[2] == device:
            return known[3]
        if choice[1].shape[:-1] == leading and choice[1].device == device:
            return choice
        batch, rows = choice[1].shape[:2]
        # A sequence's choice serves whatever rows of it a layer gets: in latent attention, also those of cached tokens.
        whole = self.pools and rows == 1 and len(leading) > 1 and leading[0] == batch
        length = leading[1:].numel() if whole else self.tokens.shape(x)[1]

        def spread(t: Tensor) -> Tensor:
            if t.shape[1] == 1:
                t = t.expand(-1, length, -1)
            elif t.shape[1] != length:
                raise RuntimeError(
                    f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)} where each of "
                    f"{t.shape[1]} tokens has its own choice; expected as many tokens"
                )
            return t.reshape(*leading, t.shape[-1]).to(device)

        routing = spread(choice[0]), spread(choice[1])
        self.spread = choice[1], leading, device, routing
        return routing
