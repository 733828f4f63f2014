# The GPU image; installs by the same lock as the Makefile. CUDA comes with the wheels, the driver with the host.
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tailor
COPY pyproject.toml README.md Makefile ./
COPY requirements requirements
# an empty package tree first: the lock's layer stays cached while the code changes
RUN mkdir gateway adapter_store training loadtests && make install ENGINE=gpu
COPY gateway gateway
COPY adapter_store adapter_store
COPY training training
COPY loadtests loadtests
RUN touch .venv/.installed-gpu && .venv/bin/python -m gateway.compile

RUN useradd --create-home tailor && mkdir /data && chown tailor /data
USER tailor
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PATH=/opt/tailor/.venv/bin:$PATH TAILOR_HOME=/data TAILOR_HOST=0.0.0.0 TAILOR_ALLOW_PUBLIC=true
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tailor"]
CMD ["up"]
