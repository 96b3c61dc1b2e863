"""examples/rl_adapters.py: `reset=` in the place of what libraries for reinforcement learning do, with their numbers.

Each adapter is held to the library's loop, restated in the example, and to the library itself where it is installed.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from programs import ROOT, load
from torch import Tensor, nn
from torch.testing import assert_close

import rnnkit

T, N, I, H, L = 9, 4, 3, 5, 2  # noqa: E741


@pytest.fixture(scope="module")
def adapters() -> ModuleType:
    return load(ROOT / "examples" / "rl_adapters.py")


def pair(cell: str, **options: Any) -> tuple[Any, Any]:
    """torch.nn's layer and rnnkit's with its weights, in float64."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(I, H, L, **options).double()
    ours = getattr(rnnkit, cell)(I, H, L, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rollout(cell: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x [T, N, I], where episodes begin, 0 or 1 [T, N], also at the first step; the states before it."""
    begins = (torch.rand(T, N) < 0.3).double()
    begins[0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    kinds = 2 if cell == "LSTM" else 1
    return random(T, N, I), begins, tuple(random(L, N, H) for _ in range(kinds))


def assert_same(
    theirs: tuple[Any, Any], ours: tuple[Any, Any], layers: tuple[Any, Any], inputs: list[Tensor]
) -> None:
    """Output, final states, and gradients of all parameters and `inputs`."""
    assert_close(ours[0], theirs[0])
    assert_close(tuple(ours[1]), tuple(theirs[1]))
    gradients = []
    for layer, (output, finals) in zip(layers, (theirs, ours), strict=True):
        loss = output.square().sum() + sum(state.square().sum() for state in finals)
        given = [*layer.parameters(), *inputs]
        gradients.append(torch.autograd.grad(loss, given, materialize_grads=True))
    assert_close(gradients[1], gradients[0])


def process_sequences() -> list[Any]:
    def installed() -> Callable:
        name = "sb3_contrib.common.recurrent.policies"
        module: Any = pytest.importorskip(name, reason="sb3-contrib is not installed")
        return module.RecurrentActorCriticPolicy._process_sequence

    return [pytest.param(lambda: None, id="restated"), pytest.param(installed, id="sb3-contrib")]


@pytest.mark.parametrize("get_own", process_sequences())
@pytest.mark.parametrize("starts", ["some", "none", "first"])
def test_process_sequence(adapters: ModuleType, get_own: Callable, starts: str) -> None:
    own = get_own()
    layers = pair("LSTM")
    x, begins, states = rollout("LSTM")
    if starts != "some":
        begins[0 if starts == "none" else 1 :] = 0
    rows, flat = x.transpose(0, 1).flatten(0, 1), begins.t().flatten()
    if own is None:
        output, finals = adapters.step_by_step(layers[0], x, states, begins)
        theirs = output.transpose(0, 1).flatten(0, 1), finals
    else:
        theirs = own(rows, states, flat, layers[0])
    found = adapters.process_sequence(rows, states, flat, layers[1])
    assert_same(theirs, found, layers, [x, *states])


def test_recurrent_ppo_of_sb3(
    adapters: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contrib: Any = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    import gymnasium
    from sb3_contrib.ppo_recurrent import MlpLstmPolicy
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    class Short(gymnasium.Env):
        """Episodes of two to six steps; the reward is for the first observation's sign."""

        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            self.left = int(self.np_random.integers(2, 7))
            first = self.observation_space.low * 0 + self.np_random.uniform(-1, 1, 2)
            self.sign = int(first[0] > 0)
            return first.astype("float32"), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            self.left -= 1
            right = float(int(action) == self.sign)
            return self.observation_space.low * 0, right, self.left == 0, False, {}

    class ResetPolicy(MlpLstmPolicy):
        _process_sequence = staticmethod(adapters.process_sequence)

    curves = []
    for policy in (MlpLstmPolicy, ResetPolicy):
        folder = tmp_path / policy.__name__
        environments = make_vec_env(Short, 3, seed=1)
        model = contrib.RecurrentPPO(
            policy, environments, n_steps=16, batch_size=24, n_epochs=2, seed=1, device="cpu"
        )
        if policy is ResetPolicy:
            rnnkit.convert(model.policy)
            assert isinstance(model.policy.lstm_actor, rnnkit.LSTM)
        model.set_logger(configure(str(folder), ["csv"]))
        model.learn(4 * 48)
        model.logger.dump(model.num_timesteps)
        with (folder / "progress.csv").open() as file:
            rows = list(csv.DictReader(file))
        curves.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_get_states(adapters: ModuleType) -> None:
    class Agent(nn.Module):
        def __init__(self, lstm: nn.Module) -> None:
            super().__init__()
            self.lstm, self.network = lstm, nn.Flatten()

        get_states = adapters.get_states

    layers = pair("LSTM")
    x, done, states = rollout("LSTM")
    output, finals = adapters.step_by_step(layers[0], x / 255.0, states, done)
    images = x.flatten(0, 1).unsqueeze(1)  # [T * N, 1, I]
    found = Agent(layers[1]).get_states(images, states, done.flatten())
    assert_same((output.flatten(0, 1), finals), found, layers, [x, *states])


def stored(states: tuple[Tensor, ...]) -> list[Tensor]:
    """Buffers [N, T, L, H] as TorchRL's: the states before the first step, zeros where later trajectories begin."""
    return [
        torch.cat([state.transpose(0, 1).unsqueeze(1), torch.zeros(N, T - 1, L, H)], 1)
        for state in states
    ]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_run_trajectories(adapters: ModuleType, cell: str) -> None:
    layers = pair(cell, batch_first=True)
    x, begins, states = rollout(cell)
    rows, is_init = x.transpose(0, 1), begins.t().bool().unsqueeze(-1)
    theirs = adapters.split_and_pack(layers[0], rows, is_init, stored(states))
    found = adapters.run_trajectories(layers[1], rows, is_init, stored(states))
    assert_same(theirs, found, layers, [x, *states])
    assert is_init[:, 0].any()  # as it was


def test_trajectories_without_states(adapters: ModuleType) -> None:
    _, layer = pair("LSTM", batch_first=True)
    x, begins, states = rollout("LSTM")
    rows, is_init = x.transpose(0, 1), begins.t().bool()
    zeros = stored(tuple(torch.zeros_like(state) for state in states))
    found = adapters.run_trajectories(layer, rows, is_init, [None, None])
    assert_close(found, adapters.run_trajectories(layer, rows, is_init, zeros))


@pytest.mark.parametrize("shape", [(T,), (N, T), (2, 2, T)], ids=["T", "B,T", "B,B,T"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_modules_of_torchrl(adapters: ModuleType, cell: str, shape: tuple[int, ...]) -> None:
    modules: Any = pytest.importorskip("torchrl.modules", reason="torchrl is not installed")
    from tensordict import TensorDict

    own = getattr(modules, f"{cell}Module")

    class ResetModule(adapters.Resets, own):
        pass

    theirs, ours = pair(cell, batch_first=True)
    x, begins, states = rollout(cell)
    names = ["h", "c"][: len(states)]
    rows = N if len(shape) > 1 else 1
    given = {"x": x.transpose(0, 1), "is_init": begins.t().bool().unsqueeze(-1)}
    given |= dict(zip(names, stored(states), strict=True))
    given = {
        name: value[:rows].reshape(*shape, *value.shape[2:]).detach()
        for name, value in given.items()
    }
    keys = {"in_keys": ["x", *names], "out_keys": ["y", *(("next", name) for name in names)]}
    found = []
    for module_class, layer in ((own, theirs), (ResetModule, ours)):
        module = module_class(**{cell.lower(): layer}, **keys)
        with modules.set_recurrent_mode(True):
            output = module(TensorDict(given, shape))
        with modules.set_recurrent_mode(False):  # all steps as rows of single ones
            single = module(TensorDict(given, shape))
        finals = [output["next", name][..., -1, :, :] for name in names]
        later = [single["next", name] for name in names]
        found.append([output["y"], *finals, single["y"], *later])
    assert_close(found[1], found[0])


def test_rollout_of_torchrl(adapters: ModuleType) -> None:
    """InitTracker and the primer store zeros where episodes begin, which `Resets` relies on."""
    modules: Any = pytest.importorskip("torchrl.modules", reason="torchrl is not installed")
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import GymEnv, InitTracker, TransformedEnv

    class ResetModule(adapters.Resets, modules.LSTMModule):
        pass

    torch.manual_seed(0)
    theirs = nn.LSTM(4, H, L, batch_first=True)
    ours = rnnkit.LSTM(4, H, L, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    keys = {"in_keys": ["observation", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    module, own = ResetModule(lstm=ours, **keys), modules.LSTMModule(lstm=theirs, **keys)
    choose = TensorDictModule(
        lambda y: nn.functional.one_hot(y[..., :2].argmax(-1), 2), ["y"], ["action"]
    )
    environment = TransformedEnv(GymEnv("CartPole-v1"), InitTracker())
    environment = environment.append_transform(module.make_tensordict_primer())
    environment.set_seed(0)
    policy = TensorDictSequential(module, choose)
    data = environment.rollout(60, policy, break_when_any_done=False)  # [T]
    begins = data["is_init"].squeeze(-1)
    assert begins.sum() > 2
    assert not data["h"][begins].any() and data["h"][~begins].any()
    with modules.set_recurrent_mode(True):
        found, expected = module(data.clone())["y"], own(data.clone())["y"]
    assert_close(found, expected)
    assert_close(found, data["y"])


def test_program(
    adapters: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "--steps 12 --batch 3 --input 4 --hidden 5 --repeats 1 --share 0.3"
    sizes = text.split()
    assert adapters.main(sizes) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("sb3-contrib", "CleanRL", "TorchRL, LSTM", "TorchRL, GRU"))
    monkeypatch.setattr(adapters, "installed", lambda package: False)
    assert adapters.main(sizes) == 0
    get_states = adapters.get_states

    def never(agent: Any, x: Tensor, states: Any, done: Tensor) -> Any:
        return get_states(agent, x, states, torch.zeros_like(done))

    monkeypatch.setattr(adapters, "get_states", never)
    assert adapters.main(sizes) == 1
