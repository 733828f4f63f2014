# The GPU image; installs by the same lock as the Makefile.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc make \
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
RUN touch .venv/.installed-gpu

RUN useradd --create-home tailor && mkdir /data && chown tailor /data
USER tailor
ENV PATH=/opt/tailor/.venv/bin:$PATH TAILOR_HOME=/data TAILOR_HOST=0.0.0.0 TAILOR_ALLOW_PUBLIC=true
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tailor"]
CMD ["up"]
