# CPU:   docker build -t acktr .
#        docker run --rm -v "$PWD/runs:/runs" acktr train CartPole-v1
# CUDA:  docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t acktr-cuda .
#        docker run --rm --gpus all -v "$PWD/runs:/runs" acktr-cuda train CartPole-v1; torch brings CUDA's libraries, the host the driver.
FROM python:3.11-slim

# What draws without a display: videos of MuJoCo, and pixels as observations.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libopengl0 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" \
        --extra-index-url https://pypi.org/simple torch

COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[classic]"

# Runs go to /runs, the folder that the command lines above hand over.
RUN useradd --create-home trainer && mkdir /runs && chown trainer /runs
USER trainer
WORKDIR /
ENTRYPOINT ["acktr"]
CMD ["--help"]
