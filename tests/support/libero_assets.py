"""Stand-ins for LIBERO's scenes and meshes: boxes of about the right size under the names that its files have.

What is tested is the adapter on LIBERO's own problem classes, goals, initial states and controllers; only the shapes
are not the published ones, which cannot be had offline.
"""

from pathlib import Path

from PIL import Image

OBJECT = """<mujoco model="{name}"><asset/><worldbody><body><body name="object">
{geoms}
</body>
<site rgba="0 0 0 0" size="0.005" pos="0 0 -{h}" name="bottom_site"/>
<site rgba="0 0 0 0" size="0.005" pos="0 0 {h}" name="top_site"/>
<site rgba="0 0 0 0" size="0.005" pos="{r} {r} 0" name="horizontal_radius_site"/>
</body></worldbody></mujoco>"""
BOX = '<geom type="box" size="{size}" pos="{pos}" rgba="{rgba}" group="{group}" {more}/>'
FLOOR = """<mujoco model="floor"><asset>
<texture file="../textures/light-gray-floor-tile.png" type="2d" name="texplane"/>
<material name="floorplane" texture="texplane"/>
<texture file="../textures/light-gray-plaster.png" type="2d" name="tex-wall"/>
<material name="walls_mat" texture="tex-wall"/></asset>
<worldbody>
<body name="floor" pos="0 0 0"><geom condim="3" group="1" material="floorplane" name="floor" pos="0 0 -0.04"
 size="3 3 .125" type="plane"/></body>
<light pos="1 1 3" dir="-.3 -.3 -1" directional="true"/>
<camera name="frontview" pos="1.6 0 1.45" quat="0.56 0.43 0.43 0.56"/>
<camera name="birdview" pos="-0.2 0 3.0" quat="0.7071 0 0 0.7071"/>
<camera name="agentview" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653"/>
<camera name="sideview" pos="-0.06 1.27 1.49" quat="0.0099 0.0069 0.5912 0.8064"/>
</worldbody></mujoco>"""


def box(size, pos=(0, 0, 0), rgba=(0.8, 0.2, 0.2, 1)):
    """A box to collide with and one to look at."""
    words = {"size": " ".join(map(str, size)), "pos": " ".join(map(str, pos)), "rgba": " ".join(map(str, rgba))}
    return BOX.format(**words, group=0, more='density="200"') + BOX.format(
        **words, group=1, more='contype="0" conaffinity="0" mass="0.0001"'
    )


def basket():
    """A tray with a region to be in."""
    walls = [box((0.09, 0.09, 0.004), (0, 0, -0.03), (0.6, 0.4, 0.2, 1))]
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        size = (0.004 if x else 0.09, 0.004 if y else 0.09, 0.03)
        walls.append(box(size, (0.09 * x, 0.09 * y, 0), (0.6, 0.4, 0.2, 1)))
    region = (
        '<site name="contain_region" type="box" size="0.08 0.08 0.05" pos="0 0 0.01" quat="1 0 0 0" rgba="0 0 0 0"/>'
    )
    return OBJECT.format(name="basket", geoms="\n".join(walls) + region, h=0.034, r=0.1)


def make_assets(root: Path) -> Path:
    """Files for ``libero_object``: its floor, its things and its basket."""
    for folder in ("scenes", "textures", "stable_scanned_objects/basket"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "scenes" / "libero_floor_base_style.xml").write_text(FLOOR)
    for name in ("light-gray-floor-tile", "light-gray-plaster"):
        Image.new("RGB", (16, 16), (180, 180, 180)).save(root / "textures" / f"{name}.png")
    (root / "stable_scanned_objects" / "basket" / "basket.xml").write_text(basket())
    names = (
        "alphabet_soup",
        "salad_dressing",
        "cream_cheese",
        "milk",
        "tomato_sauce",
        "butter",
        "bbq_sauce",
        "ketchup",
    )
    for k, name in enumerate((*names, "orange_juice", "chocolate_pudding")):
        folder = root / "stable_hope_objects" / name
        folder.mkdir(parents=True, exist_ok=True)
        rgba = (0.2 + 0.08 * k, 0.9 - 0.08 * k, 0.3, 1)
        text = OBJECT.format(name=name, geoms=box((0.022, 0.022, 0.03), rgba=rgba), h=0.03, r=0.03)
        (folder / f"{name}.xml").write_text(text)
    return root
