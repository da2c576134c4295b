# hba on a CPU, with torch of PyTorch's own index, which carries no CUDA:
#   docker build -t hba --build-arg VERSION=0.1.0 . && docker run --rm -v "$PWD/runs:/data/runs" hba demo --size tiny
FROM python:3.12-slim

# The version comes from git tags, and the image has no git.
ARG VERSION=0.1.0.dev0
ENV SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HUMAN_BEHAVIOR_ATLAS=$VERSION \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY constraints-cpu.txt ./
RUN pip install -c constraints-cpu.txt torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints-cpu.txt '.[train]' && useradd --uid 1000 --create-home hba && mkdir /data && chown hba /data

USER 1000
WORKDIR /data
ENTRYPOINT ["hba"]
CMD ["--help"]
