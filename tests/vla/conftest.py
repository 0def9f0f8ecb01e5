"""Models of a few thousand weights, and small stores of demonstrations and labelled scenes."""

import numpy as np
import pytest
import torch

from brachium.datasets.schema import StoreSchema
from brachium.datasets.statistics import FieldStatistics, Statistics
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.spec import EmbodimentSpec, FeatureSpec, Observation
from brachium.vla.recipe import Recipe
from brachium.vla.tokenizer import word_tokenizer

torch.set_num_threads(1)  # models this small are slower on more

SIZE, PATCH, WIDTH = 32, 8, 32
CAMERAS = ("front", "wrist")
TEXTS = ("put the red cube in the bowl", "push the green mug", "open the drawer", "reach the blue ball")
HEADS = {
    "flow": {"_target_": "brachium.vla.heads.flow.FlowHead", "width": 32, "depth": 2, "steps": 3, "draws": 2},
    "tokenized": {
        "_target_": "brachium.vla.heads.tokenized.TokenizedHead",
        "tokenizer": {"_target_": "brachium.vla.action_tokens.bins.BinTokenizer", "bins": 16},
        "width": 16,
        "depth": 2,
        "heads": 2,
    },
}


def vlm_config(model_type="smolvlm", **text):
    """Configuration of a SmolVLM or Idefics3 of about 50 000 weights."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "model_type": model_type,
        "scale_factor": 2,
        "vision_config": {**layers, "image_size": SIZE, "patch_size": PATCH},
        "text_config": {
            "model_type": "llama",
            **layers,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **text,
        },
    }


def backbone_node(**options):
    return {"_target_": "brachium.vla.backbones.hf.HFBackbone", "config": vlm_config(), **options}


def make_recipe(head="flow", *, points=False, **options):
    node = HEADS[head] if isinstance(head, str) else head
    options = {"backbone": backbone_node(), "head": node, "action_horizon": 4, "max_tokens": 8, **options}
    return Recipe(points=points, width=16, **options)


def make_embodiment(name="tiny", *, names=("x", "y", "z", "grip"), actions=3, cameras=CAMERAS, limits=True):
    axes = ("dx", "dy", "grip", "roll", "yaw")[:actions]
    return EmbodimentSpec(
        name=name,
        robot="tiny",
        control_hz=10.0,
        cameras=tuple(FeatureSpec(name=c, shape=(SIZE, SIZE, 3), dtype="uint8") for c in cameras),
        state=FeatureSpec(name="state", shape=(len(names),), names=names),
        action=FeatureSpec(
            name="action",
            shape=(actions,),
            names=axes,
            low=(-0.6,) * actions if limits else (),
            high=(0.5,) * actions if limits else (),
        ),
    )


def make_statistics(spec, *, seed=0, constant=()):
    """Made-up statistics; action dimensions in `constant` never change."""
    rng = np.random.default_rng(seed)
    fields = {}
    for feature in (spec.state, spec.action):
        low = rng.uniform(-2.0, -0.5, feature.dim)
        high = rng.uniform(0.5, 2.0, feature.dim)
        for k in constant if feature is spec.action else ():
            low[k] = high[k] = 0.25
        middle = (low + high) / 2
        fields[feature.name] = FieldStatistics(
            mean=middle, std=(high - low) / 4, min=low, max=high, q01=low * 0.9, q99=high * 0.9, count=100
        )
    return Statistics(fields=fields)


def make_model(recipe=None, embodiments=None, *, seed=0, corpus=TEXTS):
    """A model with random weights everywhere (no layer that starts at zero) and made-up statistics."""
    specs = embodiments or {"tiny": make_embodiment()}
    model = (recipe or make_recipe()).build(specs, word_tokenizer(corpus), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for k, (name, spec) in enumerate(specs.items()):
        model.set_statistics(name, make_statistics(spec, seed=k))
    return model.eval()


def make_observation(spec, count=3, *, seed=0, texts=TEXTS):
    rng = np.random.default_rng(seed)
    return Observation(
        images={c.name: rng.integers(0, 256, (count, *c.shape), dtype=np.uint8) for c in spec.cameras},
        state=rng.standard_normal((count, spec.state.dim)).astype(np.float32),
        instruction=tuple(texts[i % len(texts)] for i in range(count)),
    )


def episode_steps(spec, seed, length):
    """Steps of one episode, a function of the seed; action 2 is constant."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(length):
        state = rng.standard_normal(spec.state.dim).astype(np.float32)
        action = (0.3 * np.tanh(state[: spec.action.dim])).astype(np.float32)
        action[2:] = 0.25
        images = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in spec.cameras}
        yield {"images": images, "state": state, "action": action}


def record_demos(path, seeds=range(6), *, spec=None, success=True, length=7):
    """A store with one episode a seed, recorded in the order of `seeds`."""
    spec = spec or make_embodiment()
    store = EpisodeStore.create(path, StoreSchema(embodiment=spec))
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=4) as writer:
        for seed in seeds:
            writer.begin(TEXTS[seed % len(TEXTS)], meta={"seed": int(seed), "task": "toy"})
            for step in episode_steps(spec, seed, length + seed % 3):
                writer.step(**step)
            writer.end(success)
    return store.refresh()


def asked_about(kind, question, answer, things, view=0):
    """A question whose words in `things` stand for the things of these numbers, and the answer for all of them."""
    mentions = [
        {"start": question.index(word), "end": question.index(word) + len(word), "things": [k], "view": view}
        for word, k in things.items()
    ]
    meant = [{"start": 0, "end": len(answer), "things": list(things.values()), "view": view}]
    return {"kind": kind, "question": question, "answer": answer, "asked": mentions, "meant": meant}


def record_scenes(path, seeds=range(12), *, spec=None, items=3, sentences=2, field="objects", questions=False):
    """Labelled scenes: on a grey image, each item is a bright square where its label says."""
    spec = spec or make_embodiment()
    extra = FeatureSpec(name=field, shape=(items, 3 + 3 * len(spec.cameras)))
    cells = SIZE // 4
    cover = FeatureSpec(name="cover", shape=(len(spec.cameras), cells * cells), dtype="uint8")
    pixels = FeatureSpec(name="pixels", shape=(items, len(spec.cameras)))
    extras = (extra, cover, pixels) if questions else (extra,)
    store = EpisodeStore.create(path, StoreSchema(embodiment=spec, extras=extras))
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    names = ("red", "green", "blue")
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=5) as writer:
        for seed in seeds:
            rng = np.random.default_rng([seed, 2])
            images = {c.name: np.full(c.shape, 90, np.uint8) for c in spec.cameras}
            objects = np.zeros((items, extra.shape[1]), np.float32)
            covered = np.full((len(spec.cameras), cells, cells), 255, np.uint8)
            index = np.full((len(spec.cameras), SIZE, SIZE), 255, np.uint8)
            for k in range(items):
                objects[k, :3] = rng.uniform(-0.3, 0.3, 3)
                for n, camera in enumerate(spec.cameras):
                    u, v = rng.uniform(0.15, 0.85, 2)
                    objects[k, 3 + 3 * n : 6 + 3 * n] = (u, v, 1.0)
                    row, column = int(v * SIZE), int(u * SIZE)
                    images[camera.name][row - 3 : row + 3, column - 3 : column + 3] = colours[k % 3]
                    index[n, row - 3 : row + 3, column - 3 : column + 3] = k
                    covered[n, (row - 3) // 4 : (row + 6) // 4, (column - 3) // 4 : (column + 6) // 4] = k
            texts = []
            for _ in range(sentences):
                a, b = rng.choice(items, 2, replace=False).tolist()
                texts.append({"text": f"put {names[a]} on {names[b]}", "roles": {"object": a, "goal": b}})
            meta = {"seed": int(seed), "task": "scenes", "sentences": texts}
            if questions:
                left = bool(objects[0, 3] < objects[1, 3])
                v, u = (int(96 * x) for x in objects[0, [4, 3]])
                meta["names"] = [*names[:items]]
                meta["questions"] = [
                    asked_about("left", "is red left of green?", "yes" if left else "no", {"red": 0, "green": 1}),
                    asked_about("point", "where is red?", f"<loc{v:02d}><loc{u:02d}>", {"red": 0}),
                    asked_about("far", "where in the wrist view is red?", "somewhere", {"red": 0}, view=1),
                ]
            writer.begin(texts[0]["text"], meta=meta)
            state = rng.standard_normal(spec.state.dim).astype(np.float32)
            action = np.zeros(spec.action.dim, np.float32)
            labels = {field: objects}
            if questions:
                shown = (index[:, None] == np.arange(items)[:, None, None]).sum((2, 3)).T.astype(np.float32)
                labels |= {"cover": covered.reshape(len(covered), -1), "pixels": shown}
            writer.step(images=images, state=state, action=action, extras=labels)
            writer.end(True)
    return store.refresh()


@pytest.fixture(scope="session")
def demos(tmp_path_factory):
    return record_demos(tmp_path_factory.mktemp("demos") / "store")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return record_scenes(tmp_path_factory.mktemp("scenes") / "store")
