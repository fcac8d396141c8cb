import functools
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from executor._weights import seed_weights
from executor.errors import ConfigError
from executor.flops import FlopCounter, attention_in_parts
from executor.model import MODELS, build_chain, model_spec, sample_input
from executor.networks import load_network, torchvision_models
from executor.plan import Plan, candidate_cuts, candidate_plans, is_constrained, plan_mask

# What two correct runs on different machines may differ by, relative to max |y|.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def chain(request):
    return build_chain(request.param)


def difference(y, expected):
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def whole(chain):
    """The whole model's output for a seed's input."""
    return functools.cache(lambda seed: run_whole(chain, sample_input(seed)))


def seeded_network(name, seed):
    network = load_network(name)
    net = network.module
    seed_weights(net, network.input_shape, seed)
    return net


def run_whole(chain, x):
    return chain.run(x, 0, chain.spec.n_units)


def test_every_candidate_cut_splits_without_a_trace(chain, whole):
    n = chain.spec.n_units
    expected = whole(1)
    previous, y = 0, sample_input(1)
    for cut in candidate_cuts(chain.spec):
        y = chain.run(y, previous, cut)
        # As on the wire: only the bytes cross.
        y = torch.frombuffer(bytearray(y.numpy().tobytes()), dtype=y.dtype).reshape(y.shape)
        assert torch.equal(chain.run(y, cut, n), expected), cut
        previous = cut


def test_cut_sizes_are_those_of_the_tensors_that_cross(chain):
    y = sample_input(1)
    sizes = [y.nbytes]
    for k in range(chain.spec.n_units):
        y = chain.run(y, k, k + 1)
        assert y.dtype == torch.float32
        assert y.is_contiguous()
        sizes.append(y.nbytes)
    assert tuple(sizes) == chain.spec.cut_bytes


def test_no_stage_modifies_or_aliases_its_input(chain):
    x = sample_input(1)
    n = chain.spec.n_units
    for k in range(n):
        # Two units: what hands its input through may be followed by what works in place.
        for stop in (min(k + 2, n), k + 1):
            before = x.clone()
            y = chain.run(x, k, stop)
            assert torch.equal(x, before), k
            assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), k
        x = y
    assert chain.run(x, n, n) is x


def test_a_wrong_answer_shows(chain, whole):
    outputs = [whole(seed) for seed in range(3)]
    assert torch.equal(run_whole(chain, sample_input(1)), outputs[1])
    for i, right in enumerate(outputs):
        assert torch.isfinite(right).all()
        assert difference(torch.zeros_like(right), right) == 1.0
        for j, other in enumerate(outputs):
            if i != j:  # a reply swapped with another request's
                assert difference(other, right) > 30 * TOLERANCE


def test_zeroing_what_crosses_a_cut_shows(chain, whole):
    n = chain.spec.n_units
    sizes = {}
    y = sample_input(1)
    for k in range(n):
        sizes[k] = y.shape
        y = chain.run(y, k, k + 1)
    for cut in candidate_cuts(chain.spec)[:-1]:
        assert difference(chain.run(torch.zeros(sizes[cut]), cut, n), whole(1)) > 30 * TOLERANCE


def test_the_chain_is_the_torchvision_model():
    for name in ("alexnet", "mobilenet_v2"):
        chain = build_chain(name, seed=3)
        net = seeded_network(name, 3)
        with torch.inference_mode():
            expected = net.eval()(sample_input(5))
        assert torch.equal(run_whole(chain, sample_input(5)), expected)


@pytest.mark.parametrize(
    ("name", "n_units", "head_start", "static", "n_plans"),
    [
        ("alexnet", 21, 14, (10, 14), 45),
        ("vgg16", 39, 32, (11, 31), 36),
        ("mobilenet_v2", 21, 19, (10, 19), 190),
    ],
)
def test_specs(name, n_units, head_start, static, n_plans):
    spec = model_spec(name)
    assert model_spec(name) is spec
    assert (spec.n_units, spec.head_start, spec.static_plan) == (n_units, head_start, static)
    assert spec.cut_bytes[0] == 3 * 224 * 224 * 4
    assert spec.cut_bytes[-1] == 1000 * 4
    assert is_constrained(Plan(static), spec)
    plans = candidate_plans(spec)
    assert len(plans) == n_plans
    assert sum(plan_mask(plans, spec, constrained=True)) >= 6
    # Nothing but the input is worth sending where it is larger than the input.
    assert max(spec.cut_bytes[c] for c in candidate_cuts(spec)) == spec.cut_bytes[0]


def test_seeded_weights_are_the_same_on_every_machine():
    # Recorded on x86 with and without AVX: a change here breaks handshakes between machines.
    assert build_chain("alexnet").digest == "2f461548dd174d05"
    assert build_chain("mobilenet_v2").digest == "99e435528636a2ed"
    assert build_chain("mobilenet_v2", seed=1).digest == "477aeb1f9e8c3c1b"


def test_building_and_sampling_leave_the_global_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    build_chain("mobilenet_v2")
    sample_input(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_inputs_are_seeded_images():
    x = sample_input(1)
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == torch.float32
    assert torch.equal(x, sample_input(1))
    assert not torch.equal(x, sample_input(2))
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01


def test_weights_come_from_a_file(tmp_path):
    net = seeded_network("mobilenet_v2", 11)
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    chain = build_chain("mobilenet_v2", weights=str(path))
    seeded = build_chain("mobilenet_v2", seed=11)
    assert chain.digest == seeded.digest
    assert torch.equal(run_whole(chain, sample_input(0)), run_whole(seeded, sample_input(0)))


def refused(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        build_chain(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    absent = tmp_path / "absent.pt"
    assert str(absent) in refused("alexnet", weights=str(absent))
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"these are not weights" * 10)
    assert str(garbage) in refused("alexnet", weights=str(garbage))
    assert str(tmp_path) in refused("alexnet", weights=str(tmp_path))
    for name, content in {
        "tensor": torch.zeros(3),
        "other model": {"features.0.weight": torch.zeros(2)},
        "no tensors": {"features.0.weight": "text"},
    }.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        assert str(path) in refused("alexnet", weights=str(path))


def test_a_failed_download_is_refused(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert "no route to host" in refused("alexnet", weights="DEFAULT")


def test_unknown_models_and_devices_are_refused():
    assert "close: resnet" in refused("resnet9000")
    with pytest.raises(ConfigError, match="unknown model"):
        model_spec("resnet9000")
    assert "'abacus'" in refused("alexnet", device="abacus")
    if not torch.cuda.is_available():
        assert "'cuda'" in refused("alexnet", device="cuda")


def test_a_stage_outside_the_model_is_refused():
    chain = build_chain("alexnet")
    for start, stop in ((-1, 3), (3, 2), (0, 22)):
        with pytest.raises(ConfigError, match=r"0\.\.21"):
            chain.run(sample_input(0), start, stop)


def test_another_import_error_of_torchvision_is_not_hidden(monkeypatch):
    def broken(name):
        raise RuntimeError("something else is wrong")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        torchvision_models.__wrapped__()


def test_operations_are_counted_as_torch_counts_them():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(2),
        nn.TransformerEncoderLayer(36, 4, 20, batch_first=True), nn.Linear(36, 5),
    ).eval()  # fmt: skip
    x = torch.zeros(1, 3, 10, 10)
    with torch.no_grad(), attention_in_parts():
        with FlopCounter() as counter:
            net(x)
        # Torch's own has no formula for the kernel that the products are fused into on the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as expected:
            net(x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert counter.total == expected.get_total_flops() > 0
    assert FlopCounter().total == 0
    # Not wrapped in what imports torch's compiler at the first operation.
    assert not hasattr(FlopCounter.__torch_dispatch__, "__wrapped__")


def test_nothing_of_torch_s_compiler_is_loaded_for_a_model():
    code = (
        "import sys; from executor.model import build_chain; build_chain('mobilenet_v2'); "
        "print(sorted({'sympy', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_torchvision_left_out_of_the_compiler_is_there_when_it_is_used():
    models = torchvision_models()
    assert torchvision_models.__wrapped__() is models  # what is there is not imported again
    roi_align = importlib.import_module("torchvision.ops.roi_align")
    if "is_compile_supported" not in vars(roi_align):
        pytest.skip("this torchvision asks the compiler nothing")
    assert roi_align.is_compile_supported("cpu") in (True, False)


def test_modules_made_elsewhere_still_draw_their_values():
    load_network("alexnet")
    layer = nn.Linear(8, 8)
    assert 0.0 < float(layer.weight.detach().abs().max()) < 1.0
