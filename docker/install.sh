#!/bin/bash
# Python 3.12, compilers and the packages of requirements/cuda13.lock, into /opt/oreal of an image. Run beside requirements/.
set -euo pipefail
apt-get update
apt-get install --yes --no-install-recommends build-essential git libnuma1 python3.12-dev python3.12-venv
rm -rf /var/lib/apt/lists/*
python3.12 -m venv /opt/oreal
# First what comes as wheels, torch among it; then Transformer Engine, which is compiled beside that torch.
grep --invert-match '^transformer-engine' requirements/cuda13.lock >/opt/wheels.lock
/opt/oreal/bin/pip install --no-cache-dir --no-deps --requirement /opt/wheels.lock
PATH=/opt/oreal/bin:$PATH pip install --no-cache-dir --no-deps --no-build-isolation --requirement requirements/cuda13.lock
