# The course in a container: for a server, or to install nothing on the machine itself.
#     docker build -t finetune-lab .
#     docker run --rm -p 127.0.0.1:8888:8888 -v finetune-lab:/home/learner/finetune-lab/notebooks finetune-lab
# Then open the address that it prints. The volume keeps your notebooks and your progress.
# docs/places.md says what of this was run.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 learner && install -d -o learner /home/learner/finetune-lab
USER 1000
WORKDIR /home/learner/finetune-lab
COPY --chown=1000 . .

# For a machine without an NVIDIA GPU, give the address of torch's CPU builds (docs/places.md); otherwise the image
# holds 3 GB of CUDA:  docker build --build-arg FINETUNE_LAB_TORCH_INDEX=ADDRESS -t finetune-lab .
ARG FINETUNE_LAB_TORCH_INDEX
RUN PIP_NO_CACHE_DIR=1 python tasks.py install

ENV PATH=/home/learner/finetune-lab/.venv/bin:$PATH FINETUNE_LAB_HOME=/home/learner/finetune-lab/notebooks/.progress
EXPOSE 8888
CMD ["python", "tasks.py", "lab", "--no-browser", "--ip=0.0.0.0"]
