"""A forward that is one call: a fused model that does not run its own, and all that has to make it run again."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from thirdparty import torchvision_models
from torch import fx, nn

import resnet_fused as rf
from resnet_fused.kernels import native
from resnet_fused.nn import plain

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no native kernels")

X = torch.randn(2, 16, 10, 9, generator=torch.Generator().manual_seed(1))


def stage():
    return nn.Sequential(plain.BasicBlock(16, 16), plain.BasicBlock(16, 16))


class Net(nn.Module):
    """Two stages and a head, called by a method."""

    def __init__(self):
        super().__init__()
        self.layer1, self.nothing, self.layer2 = stage(), nn.Dropout2d(0.5), stage()
        self.avgpool, self.flat, self.drop = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
        self.fc = nn.Linear(16, 10)

    def forward(self, image):
        return self.classify(self.features(image))

    def features(self, image):
        return self.layer2(self.nothing(self.layer1(image)))

    def classify(self, x):
        return self.fc(self.drop(self.flat(self.avgpool(x))))


class Features(Net):
    def forward(self, image):
        return self.features(image)


def made(make):
    torch.manual_seed(0)
    return rf.models.randomize_batchnorms(make()).eval()


def sequential():
    return nn.Sequential(stage(), stage())


def both(make):
    """A model, and what `fuse` makes of it, recorded."""
    net = made(make)
    fast = rf.fuse(net)
    with torch.no_grad():
        fast(X)
    return net, fast


def same(fast, net, x=X):
    """That two models give the same, twice: what is recorded the first time may be wrong the second."""
    with torch.no_grad():
        for _ in range(2):
            y, expected = fast(x), net(x)
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4 if x.dtype == torch.float32 else 0.1)
            assert y.dtype == expected.dtype and y.stride() == expected.stride()


def count_calls(monkeypatch, cls):
    """The modules of a class that are called from now on."""
    calls = []
    call = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, *args: calls.append(self) or call(self, *args))
    return calls


# --- it is one call, and gives the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("make", "length"), [(Net, 5), (Features, 4), (sequential, 4)])
def test_one_call(make, length, dtype, memory_format, weights, replays, monkeypatch):
    net = made(make).to(dtype).to(memory_format=weights)
    fast, x = rf.fuse(net), X.to(dtype).contiguous(memory_format=memory_format)
    same(fast, net, x)
    assert replays == [length] * 2
    called = count_calls(monkeypatch, nn.Module)
    with torch.no_grad():
        fast(x)
    assert called == [fast]  # and none of its children


# --- it is not one call where the forward does more -----------------------------------------------------------------


class Softmax(Net):
    def classify(self, x):
        return torch.softmax(self.fc(self.flat(self.avgpool(x))), 1)


class OneMore(Net):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(10, 10)

    def classify(self, x):
        return self.last(self.fc(self.flat(self.avgpool(x))))


class Classifier(Net):
    """Its head goes on in a child with more layers than one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))


class Tuple(Net):
    def forward(self, image):
        return (self.classify(self.features(image)),)


class Before(Net):
    def forward(self, image):
        return self.classify(self.features(torch.mul(image, 2)))


class Beside(Net):
    """Calls something whose output nothing takes."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Softplus()

    def forward(self, image):
        unused = self.extra(image)  # noqa: F841
        return self.features(image)


class Both(Net):
    """Gives something that passes on its way, too."""

    def forward(self, image):
        x = self.features(image)
        return x, self.classify(x)


@pytest.mark.parametrize("make", [Softmax, OneMore, Classifier, Tuple, Before, Beside, Both])
def test_a_forward_that_does_more_runs(make):
    net, fast = both(make)
    outputs = []
    for model in (net, fast):
        if make is Beside:
            model.extra.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        y, expected = fast(X), net(X)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    assert type(y) is type(expected) and len(outputs) == (2 if make is Beside else 0)


def test_what_no_trace_shows_is_done():
    """A function of constants runs while torch.fx traces the forward, and is not in the graph."""

    class Seeds(Net):
        def forward(self, image):
            seed = torch.manual_seed(5)  # noqa: F841
            return self.classify(self.features(image))

    _, fast = both(Seeds)
    torch.manual_seed(1)
    with torch.no_grad():
        fast(X)
    assert torch.initial_seed() == 5


# --- what has changed since is seen ---------------------------------------------------------------------------------


class Alias(Features):
    """Reaches its stages by the second of two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Module()
        self.first.layer1, self.first.layer2 = self.layer1, self.layer2
        del self.layer1, self.layer2

    def features(self, image):
        return self.second.layer2(self.second.layer1(image))


def other_modules():
    other = nn.Module()
    other.layer1, other.layer2 = nn.Softplus(), nn.Identity()
    return other


def reordered(m):
    m._modules["0"] = m._modules.pop("0")


CHANGES = {
    "forward": (Net, lambda m: setattr(m, "forward", lambda image: -image)),
    "method": (Net, lambda m: setattr(m, "features", lambda image: -image)),
    "dropout's mode": (Net, lambda m: m.drop.train()),
    "dropout": (Net, lambda m: setattr(m, "drop", nn.Softplus())),
    "flatten": (Net, lambda m: setattr(m, "flat", nn.Sequential(nn.Flatten(), nn.Softplus()))),
    "linear layer": (Net, lambda m: setattr(m, "fc", nn.Linear(16, 3))),
    "linear layer's weight": (Net, lambda m: m.fc.weight.mul_(3)),
    "linear layer's forward": (Net, lambda m: setattr(m.fc, "forward", torch.neg)),
    "pooling": (Net, lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1))),
    "mode of what does nothing": (Net, lambda m: m.nothing.train()),
    "what does nothing": (Net, lambda m: setattr(m, "nothing", nn.Softplus())),
    "state dict": (Net, lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()})),
    "child added to a sequential": (sequential, lambda m: m.append(nn.Softplus())),
    "child put into a sequential": (sequential, lambda m: m.insert(1, nn.Softplus())),
    "child taken off a sequential": (sequential, lambda m: m.__delitem__(1)),
    "order of a sequential": (sequential, reordered),
    "what its second name stands for": (Alias, lambda m: setattr(m, "second", other_modules())),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(make, change):
    net, fast = both(make)
    with torch.no_grad():
        before = fast(X)
        for model in (net, fast):
            torch.manual_seed(1)  # new layers
            change(model)
        outputs = []
        for model in (net, fast):
            torch.manual_seed(2)  # dropout
            outputs.append(model(X))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert before.shape != outputs[1].shape or not torch.allclose(before, outputs[1], rtol=1e-2)


@pytest.mark.parametrize("name", ["forward", "features"])
def test_a_class_patched_later(name, monkeypatch):
    class Own(Net):
        forward, features = Net.forward, Net.features

    net, fast = both(Own)
    monkeypatch.setattr(Own, name, lambda self, image: Net.features(self, image) * 2)
    same(fast, net)


def test_a_class_made_of_the_fused_one():
    """As torch's parametrizations and FSDP make one."""
    net, fast = both(Net)
    for model in (net, fast):
        body = {"features": lambda self, image: Net.features(self, image) * 2}
        model.__class__ = type("Own", (type(model),), body)
    same(fast, net)


@pytest.mark.parametrize("where", ["", "layer1", "nothing", "layer2.1.bn1", "avgpool", "flat", "drop", "fc"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hooks_see_what_passes(where, kind, with_kwargs, replays):
    net, fast = both(Net)
    seen = {}

    def hooked(model):
        def look(module, *values):
            value = torch.utils._pytree.tree_leaves(values if kind == "forward_pre" else values[-1])[0]
            seen.setdefault(model, []).append(value.clone())

        return getattr(model.get_submodule(where), f"register_{kind}_hook")(look, with_kwargs=with_kwargs)

    handles = [hooked(model) for model in (net, fast)]
    same(fast, net)
    torch.testing.assert_close(seen[fast], seen[net], rtol=1e-3, atol=1e-4)
    for handle in handles:
        handle.remove()
    replays.clear()
    same(fast, net)
    assert replays == [5, 5]


# --- the model is still what it was ---------------------------------------------------------------------------------


class Masked(Features):
    """Takes more than it uses."""

    def forward(self, image, mask):
        return self.features(image)


def test_names_and_arguments():
    net, fast = both(Net)
    assert isinstance(fast, Net) and type(fast).__name__ == "Net" and repr(fast).startswith("Net(")
    assert type(fast).__module__ == __name__  # what save_pretrained of transformers and others write down
    assert inspect.signature(fast.forward) == inspect.signature(net.forward)
    same(lambda x: fast(image=x), net)
    with torch.no_grad():
        for args in ((), (X, X)):
            with pytest.raises(TypeError):
                fast(*args)
        with pytest.raises(TypeError):
            rf.fuse(made(Masked))(X)


def test_ways_to_call_it():
    net, fast = both(Net)
    for call in (fast.forward, lambda x: type(fast).forward(fast, x), lambda x: Net.forward(fast, x)):
        same(call, net)  # without the hooks that a call has
        same(fast, net)
    x = X.clone().requires_grad_()
    gradients = [torch.autograd.grad(model(x).square().sum(), [x, model.fc.weight]) for model in (fast, net)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(X).dtype == net(X).dtype == torch.bfloat16
    doubled = {name: t * 2 for name, t in net.state_dict().items() if t.is_floating_point()}
    same(*(lambda x, m=m: torch.func.functional_call(m, doubled, (x,)) for m in (fast, net)))
    same(fast, net)


@pytest.mark.parametrize(
    "bad", [X[0], X[:, :3], X.double(), X[None], None], ids=["3d", "channels", "dtype", "5d", "none"]
)
def test_wrong_inputs_are_refused(bad):
    _, fast = both(Net)
    with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)):
        fast(bad)


def test_as_a_part_of_another_model(replays):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.last = Features(), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return {"out": self.last(self.backbone(x))}

    fast = rf.fuse(made(Net))
    wrapped, net = nn.Sequential(fast, nn.Softmax(1)).eval(), nn.Sequential(made(Net), nn.Softmax(1)).eval()
    same(wrapped, net)
    assert replays == [5, 5]
    net, fast = both(Wrapper)
    same(*(lambda x, m=m: m(x)["out"] for m in (fast, net)))


def test_copies():
    net, fast = both(Net)
    shallow, replica = copy.copy(fast), fast._replicate_for_data_parallel()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), shallow, replica, nn.DataParallel(fast)):
        same(twin, net)
        same(fast, net)
    # The shallow copy has children of its own choice, and so has the model that it was made from.
    shallow._modules = {**fast._modules, "fc": nn.Linear(16, 3)}
    with torch.no_grad():
        assert shallow(X).shape == (2, 3) and fast(X).shape == (2, 10)


def test_fused_and_unfused_again(replays):
    net, fast = both(Net)
    plain_again = rf.unfuse(fast)
    assert type(plain_again) is Net and not hasattr(plain_again, "_fused_whole")
    same(plain_again, net)
    replays.clear()
    same(rf.fuse(fast), net)
    assert replays == [5, 5]
    rf.unfuse(fast.layer1, inplace=True)
    same(fast, net)


def test_two_models_share_children():
    nets = [made(Features) for _ in range(2)]
    nets[1].layer1, nets[1].layer2 = nets[0].layer1, nets[0].layer2
    x = X.to(memory_format=torch.channels_last)
    expected = copy.deepcopy(nets[0])
    for model in (*nets, nets[0]):
        rf.fuse(model, inplace=True)
        for each in nets:
            same(each, expected, x)
    rf.unfuse(nets[0], inplace=True)
    for each in nets:
        same(each, expected, x)


def test_two_threads_at_once():
    net, fast = both(Net)
    images = [torch.randn(1 + i % 2, 16, 7, 7) for i in range(6)]
    with torch.no_grad():
        expected = [net(x) for x in images]
    right = []

    def work():
        with torch.no_grad():
            right.extend(
                torch.allclose(fast(x), y, rtol=1e-3, atol=1e-4)
                for _ in range(5)
                for x, y in zip(images, expected, strict=True)
            )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 60


def test_tracing():
    net, fast = both(Net)
    traced = fx.symbolic_trace(fast)
    assert traced.graph.find_nodes(op="placeholder")[0].name == "image"
    same(traced, net)
    with torch.no_grad():
        jitted, expected = torch.jit.trace(fast, X, check_trace=False), net(X + 1)
        exported = torch.export.export(fast, (), {"image": X}).module()
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        for y in (jitted(X + 1), exported(image=X + 1), compiled(X + 1)):
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_a_feature_extractor():
    torchvision_models()
    from torchvision.models.feature_extraction import create_feature_extractor

    net, fast = both(Net)
    features = [create_feature_extractor(m, ["layer1", "flat", "fc"]) for m in (net, fast)]
    with torch.no_grad():
        torch.testing.assert_close(*(extract(X) for extract in features), rtol=1e-3, atol=1e-4)


def test_an_edited_graph():
    """A GraphModule writes its forward to its class anew: that class has to stay its own."""

    class Layers(Net):
        def __init__(self):
            super().__init__()
            layers = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
            self.a, self.b, self.c, self.d, self.e = layers
            del self.layer1, self.layer2, self.nothing

        def features(self, image):
            return self.e(self.d(self.c(self.b(self.a(image)))))

    net = fx.symbolic_trace(made(Layers))
    fast = rf.fuse(net)
    for model in (net, fast):
        *_, last, output = model.graph.nodes
        with model.graph.inserting_before(output):
            output.args = (model.graph.call_function(torch.mul, (last, 3)),)
        model.recompile()
    for model in (fast, copy.deepcopy(fast), rf.unfuse(fast), rf.fuse(fast)):
        same(model, net)


# --- classes of every kind ------------------------------------------------------------------------------------------


class Arguments(Net):
    """Takes more in methods of nn.Module than it has to, and names things as this package does."""

    def __init__(self):
        super().__init__()
        self.pieces, self.classes = self.layer2, 10

    def train(self, mode=True, frozen=False):
        self.frozen = frozen
        return super().train(mode)

    def fusions(self):
        return "mine"


class Slots(Net):
    __slots__ = ("slot",)


class Wraps(Net):
    """Does something to the forward of every subclass."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            forward = cls.forward
            cls.forward = lambda self, image: forward(self, image) * 2


class Refuses(Net):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclass")


class Meta(type):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class WithMeta(Net, metaclass=Meta):
    pass


class Called(Net):
    def __call__(self, *args):
        return super().__call__(*args) * 2


class Private(Net):
    def __init__(self):
        super().__init__()
        self.__hidden = self.layer2

    def features(self, image):
        return self.__hidden(self.layer1(image))


class Super(Net):
    def features(self, image):
        return super().features(image)


@pytest.mark.parametrize("make", [Arguments, Slots, Wraps, Refuses, WithMeta, Called, Private, Super])
def test_classes(make):
    net, fast = both(make)
    same(fast, net)
    same(rf.unfuse(fast), net)
    if make is Arguments:
        assert fast.fusions() == "mine" and fast.train(False, frozen=True).frozen and fast.pieces is fast.layer2
    if make is Slots:
        fast.slot = 1


class Reduced(Net):
    """Says how it is made again."""

    def __reduce__(self):
        return made, (Reduced,)


class MadeWith(Net):
    """Cannot be made without an argument."""

    def __new__(cls, number):
        return super().__new__(cls)

    def __init__(self, number=3):
        super().__init__()
        self.number = number

    def __getnewargs__(self):
        return (self.number,)


@pytest.mark.parametrize("make", [Reduced, lambda: MadeWith(3)], ids=["reduce", "new"])
def test_classes_with_copies_of_their_own(make):
    net, fast = made(make), rf.fuse(made(make), inplace=True)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        same(twin, net)


class Edited(Net):
    """Its methods change between a write and a read."""


def unnamed():
    def features(self, image):
        return self.layer2(self.nothing(self.layer1(image)))

    return features


def scaled(self, image):
    return self.layer2(self.layer1(torch.mul(image, 2)))


def test_a_file_read_with_other_source(monkeypatch, replays):
    """The function of then is not in the file, by name or otherwise: what is read runs the one of now."""
    monkeypatch.setattr(Edited, "features", unnamed(), raising=False)  # which pickle could not find
    net, fast = both(Edited)
    data = pickle.dumps(fast)
    replays.clear()
    same(pickle.loads(data), net)
    assert replays == [5, 5]
    monkeypatch.setattr(Edited, "features", scaled)
    same(pickle.loads(data), net)
    monkeypatch.delattr(Edited, "features")
    same(pickle.loads(data), net)
