"""The steps as compiled programs: shardings given on every side, the state donated, the mesh set around the trace."""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from salt_jax import sharding
from salt_jax.models import splash
from salt_jax.outline import Work
from salt_jax.recipe import Recipe
from salt_jax.stages import StepSpec


class Layout(NamedTuple):
  """Where the arguments of a step lie: shardings of the state and of the frozen networks, and the mesh."""

  state: PyTree
  frozen: PyTree
  mesh: Mesh


def options(rec: Recipe, kind: str) -> dict[str, str]:
  """What the compiler is told for a device kind: room for the blocks of splash."""
  splashed = any(cfg is not None and cfg.attention == 'splash' for cfg in (rec.model, rec.teacher))
  return {'xla_tpu_scoped_vmem_limit_kib': str(splash.VMEM_KIB[kind])} if splashed else {}


def jitted(
  spec: StepSpec | Work,
  rec: Recipe,
  layout: Layout,
  traces: collections.Counter,
  keep_unused: bool = False,
) -> Callable:
  """The step under `jax.jit`, to be called or lowered while the mesh is set; counts how often it is traced."""

  def counted(state, frozen, batch, n):
    traces[spec.name] += 1
    return spec.run(state, frozen, batch, n, recipe=rec)

  functools.update_wrapper(counted, spec.run)
  everywhere = sharding.replicated(layout.mesh)
  return jax.jit(
    counted,
    donate_argnums=0,
    in_shardings=(layout.state, layout.frozen, sharding.batch_sharding(layout.mesh), everywhere),
    out_shardings=(layout.state, everywhere),
    compiler_options=options(rec, layout.mesh.devices.flat[0].device_kind),
    keep_unused=keep_unused,
  )


def step(spec: StepSpec, rec: Recipe, layout: Layout, traces: collections.Counter) -> Callable:
  """`(state, frozen, batch, n) -> (state, metrics)`, compiled at its first call."""
  run = jitted(spec, rec, layout, traces)

  @functools.wraps(run)
  def on_mesh(*args):
    with jax.set_mesh(layout.mesh):
      return run(*args)

  return on_mesh
