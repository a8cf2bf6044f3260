# nvae-tf on CPUs. docs/containers.md says how to run it.
FROM python:3.12-slim
COPY . /source
RUN pip install --no-cache-dir "/source[photos,tune]" && rm -rf /source
RUN useradd --uid 1000 --create-home nvae
USER nvae
WORKDIR /home/nvae
CMD ["nvae-train", "--help"]
