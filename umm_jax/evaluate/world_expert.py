"""Who draws and edits pictures of the world as a call says, by its rules: what a right call is worth.

It knows the world's words and nothing of the dialogue. With it, the figures of a model that writes calls tell
how well it asks, and not how well somebody draws.
"""

from umm_jax.conversation import ImageData
from umm_jax.generate import Loaded
from umm_jax.router.execute import Executor
from umm_jax.router.experts import ExpertError, Medium, Registry, Request, Result, Spec
from umm_jax.router.replies import attend
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.state import apply
from umm_jax.world.talk import world


class WorldExpert:
    """Draws and edits by rules."""

    def __init__(self, config: WorldConfig):
        self.config, self.world, self.judge = config, world(config), Judge(config)
        tasks = frozenset({"image_gen", "image_edit"})
        self.spec = Spec("world.rules", "1", tasks, degraded=True, priority=100)

    def run(self, request: Request) -> Result:
        grammar, prompt = self.world.grammar, " ".join(request.prompt.split())
        if request.task == "image_gen":
            scene = grammar.parse_scene(prompt.removeprefix("draw "))
            if scene is None:
                raise ExpertError(f"{prompt[:80]!r} describes no scene of this world")
        else:
            seen = self.judge.read(ImageData.from_array(request.medium.value))
            edit = grammar.parse_edit(prompt, seen.scene)
            if edit is None:
                raise ExpertError(f"{prompt[:80]!r} is nothing that can be done to this picture")
            scene = apply(edit, seen.scene)
        return Result((Medium("image", self.world.renderer.render(scene)),))

    def close(self) -> None:
        """Holds nothing."""


def world_executor(config: WorldConfig) -> Executor:
    """An executor whose only expert is the world's."""
    registry = Registry({})
    registry.add(WorldExpert(config))
    return Executor(registry)


def attended(loaded: Loaded) -> Loaded:
    """A loaded model; one that writes calls has what they ask for done by the rules of its run's world."""
    attend(loaded.replier, world_executor(WorldConfig.of(loaded.run)))
    return loaded
