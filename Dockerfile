# hba on a CPU, with torch of PyTorch's own index, which carries no CUDA:
#   docker build -t hba --build-arg VERSION=0.1.0 .
#   mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/data/runs" hba demo --size tiny
FROM python:3.12-slim

# The version comes from git tags, and the image has no git.
ARG VERSION=0.1.0.dev0
ENV SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HUMAN_BEHAVIOR_ATLAS=$VERSION \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY constraints-cpu.txt ./
# That index has one version each of what torch needs, which need not be the one that is pinned: it comes from PyPI below.
RUN pip install --no-deps -c constraints-cpu.txt torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src src
# Whoever `docker run --user` names writes what is mounted as its owner does, and caches below a home of anybody.
RUN pip install -c constraints-cpu.txt '.[train]' \
    && useradd --uid 1000 --create-home hba && mkdir /data && chmod 1777 /data /home/hba
ENV HOME=/home/hba USER=hba

USER 1000
WORKDIR /data
ENTRYPOINT ["hba"]
CMD ["--help"]
