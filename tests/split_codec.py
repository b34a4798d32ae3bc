"""Encodes and decodes tiny clips split over the devices that there are, for `tests.test_codec`: `OUTPUT.npz`."""

import sys

import jax
import numpy as np

from salt_jax import codec
from tests.test_codec import SHALLOW, SIZES, clips, shallow_params


def main(output: str) -> None:
  codec.POSITIONS = 0  # every frame counts as large
  params, found = shallow_params(), {}
  for rows, columns in SIZES:
    latents, video = clips(rows, columns)
    encoded = codec.encode(params, video, SHALLOW, 1)
    assert len(encoded.sharding.device_set) == len(jax.local_devices())
    assert not encoded.sharding.is_fully_replicated
    # A sampler calls it with the mesh of its parameters set.
    with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ('data',))):
      decoded = codec.decode(params, latents, SHALLOW, 1)
    found |= {
      f'decoded_{rows}_{columns}': decoded,
      f'encoded_{rows}_{columns}': np.asarray(encoded),
    }
  np.savez(output, **found)


if __name__ == '__main__':
  main(sys.argv[1])
