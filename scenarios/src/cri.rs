//! Driving the container runtime as a kubelet does.

use std::{collections::HashMap, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest, CreateContainerRequest,
    ExecSyncRequest, ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, runtime_service_client::RuntimeServiceClient,
};
use palisade_transport::local;
use tonic::transport::{Channel, Endpoint};

/// Namespace of all pods here.
pub const NAMESPACE: &str = "scenarios";
pub const WORKLOAD_IMAGE: &str = "palisade.test/workload:1";

/// Longest time that one step may take, under emulation.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long one that is known to be long may take, on a machine that others share.
const PATIENCE: Duration = Duration::from_secs(400);

/// The runtime.
#[derive(Clone)]
pub struct Runtime {
    /// Waits longer.
    patient: RuntimeServiceClient<Channel>,
    client: RuntimeServiceClient<Channel>,
}

/// A container to be made.
#[derive(Clone, Copy, Default)]
pub struct Spec<'a> {
    pub name: &'a str,
    /// The workload's when empty.
    pub image: &'a str,
    /// The image's own when empty.
    pub command: &'a [&'a str],
    /// Folders of the host and where the container sees them.
    pub mounts: &'a [(&'a Path, &'a str)],
    /// Further mounts, which are more than a folder and a place.
    pub volumes: &'a [Mount],
    pub annotations: &'a [(&'a str, &'a str)],
    pub privileged: bool,
}

/// A pod sandbox.
pub struct Pod {
    pub id: String,
    config: PodSandboxConfig,
}

/// How a command in a container ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Runtime {
    pub fn connect(socket: &Path) -> Self {
        Self {
            client: RuntimeServiceClient::new(channel(socket)),
            patient: RuntimeServiceClient::new(channel_within(socket, PATIENCE)),
        }
    }

    /// Starts a pod in the host's network, with the label `app`.
    pub async fn pod(&self, name: &str, app: &str, handler: &str) -> Result<Pod> {
        self.pod_with(name, app, handler, NamespaceMode::Container, &[]).await
    }

    /// The same, with the host's pid namespace (`NamespaceMode::Node`) or its own, and annotations.
    pub async fn pod_with(
        &self,
        name: &str,
        app: &str,
        handler: &str,
        pid: NamespaceMode,
        annotations: &[(&str, &str)],
    ) -> Result<Pod> {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: NAMESPACE.to_owned(),
                attempt: 0,
            }),
            labels: HashMap::from([("app".to_owned(), app.to_owned())]),
            annotations: annotations
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            log_directory: String::new(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    // Without it the runtime refuses a privileged container in the pod.
                    privileged: pid == NamespaceMode::Node,
                    namespace_options: Some(NamespaceOption {
                        network: NamespaceMode::Node as i32,
                        pid: pid as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let answer = self
            .client
            .clone()
            .run_pod_sandbox(request)
            .await
            .with_context(|| format!("starting pod {name}"))?;
        Ok(Pod { id: answer.into_inner().pod_sandbox_id, config })
    }

    /// Creates and starts a container. Empty `command` means the image's own.
    pub async fn container(&self, pod: &Pod, name: &str, image: &str, command: &[&str]) -> Result<String> {
        let id = self.create(pod, &Spec { name, image, command, ..Spec::default() }).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// Creates a container.
    pub async fn create(&self, pod: &Pod, spec: &Spec<'_>) -> Result<String> {
        let Spec { name, image, command, mounts, volumes, annotations, privileged } = spec;
        let image = if image.is_empty() { WORKLOAD_IMAGE } else { image };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: (*name).to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: image.to_owned(), ..Default::default() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            mounts: mounts
                .iter()
                .map(|(host, container)| Mount {
                    host_path: host.display().to_string(),
                    container_path: (*container).to_owned(),
                    ..Default::default()
                })
                .chain(volumes.iter().cloned())
                .collect(),
            annotations: annotations
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    privileged: *privileged,
                    namespace_options: pod
                        .config
                        .linux
                        .as_ref()
                        .and_then(|linux| linux.security_context.as_ref()?.namespace_options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = client
            .create_container(request)
            .await
            .with_context(|| format!("creating container {name}"))?
            .into_inner()
            .container_id;
        Ok(id)
    }

    /// Creates a container of a configuration that is complete, with its log in `log`, and starts it.
    pub async fn run(&self, pod: &Pod, config: ContainerConfig, log: &Path) -> Result<String> {
        std::fs::create_dir_all(log)?;
        let sandbox = PodSandboxConfig { log_directory: log.display().to_string(), ..pod.config.clone() };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        let answer = self.client.clone().create_container(request).await.context("creating a container")?;
        let id = answer.into_inner().container_id;
        self.start(&id).await?;
        Ok(id)
    }

    /// Starts a container that was created.
    pub async fn start(&self, container: &str) -> Result<()> {
        self.client
            .clone()
            .start_container(StartContainerRequest { container_id: container.to_owned() })
            .await
            .with_context(|| format!("starting container {container}"))?;
        Ok(())
    }

    /// Waits until a container has ended, and returns its exit code.
    pub async fn ended(&self, container: &str) -> Result<i32> {
        let mut state = "";
        until(&format!("{container} ends"), async || {
            let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
            let answer = self.client.clone().container_status(request).await?.into_inner();
            let status = answer.status.context("no status")?;
            state = status.state().as_str_name();
            Ok((status.state() == ContainerState::ContainerExited).then_some(status.exit_code))
        })
        .await
        .with_context(|| format!("its state is {state}"))
    }

    /// The process id of a container's entrypoint, as the host sees it.
    pub async fn pid(&self, container: &str) -> Result<u32> {
        let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
        let answer = self.client.clone().container_status(request).await?.into_inner();
        let info: serde_json::Value =
            serde_json::from_str(answer.info.get("info").context("the runtime tells no details")?)?;
        info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("the runtime tells no pid")
    }

    /// Runs a command in a container, as `kubectl exec` does.
    pub async fn exec(&self, container: &str, command: &[&str]) -> Result<Ended> {
        Self::exec_by(self.client.clone(), DEADLINE, container, command).await
    }

    /// The same, for what takes much longer than a step.
    pub async fn exec_long(&self, container: &str, command: &[&str]) -> Result<Ended> {
        Self::exec_by(self.patient.clone(), PATIENCE, container, command).await
    }

    async fn exec_by(
        mut client: RuntimeServiceClient<Channel>,
        deadline: Duration,
        container: &str,
        command: &[&str],
    ) -> Result<Ended> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: deadline.as_secs().cast_signed(),
        };
        let answer =
            client.exec_sync(request).await.with_context(|| format!("executing {command:?}"))?.into_inner();
        Ok(Ended {
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Whether a container runs, and its exit code if not.
    pub async fn state(&self, container: &str) -> Result<(bool, i32)> {
        let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let status =
            self.client.clone().container_status(request).await?.into_inner().status.context("no status")?;
        Ok((status.state == ContainerState::ContainerRunning as i32, status.exit_code))
    }

    /// Stops and removes a container.
    pub async fn remove_container(&self, container: &str) -> Result<()> {
        let mut client = self.client.clone();
        client
            .stop_container(StopContainerRequest { container_id: container.to_owned(), timeout: 0 })
            .await
            .context("stopping a container")?;
        client
            .remove_container(RemoveContainerRequest { container_id: container.to_owned() })
            .await
            .context("removing a container")?;
        Ok(())
    }

    /// Stops and removes a pod with all its containers.
    pub async fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let mut client = self.client.clone();
        // Containerd closes its connection to a container that ends this moment, and reports that as an error. The call may be
        // repeated, and a kubelet does so.
        until("a pod to stop", async || {
            match client
                .clone()
                .stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() })
                .await
            {
                Ok(_) => Ok(Some(())),
                Err(status) if status.message().contains("ttrpc: closed") => Ok(None),
                Err(status) => Err(status).context("stopping a pod"),
            }
        })
        .await?;
        client
            .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() })
            .await
            .context("removing a pod")?;
        Ok(())
    }
}

/// Connects to the runtime at `socket` when it is needed.
pub fn channel(socket: &Path) -> Channel {
    channel_within(socket, DEADLINE)
}

fn channel_within(socket: &Path, deadline: Duration) -> Channel {
    Endpoint::from_static(local::ANY)
        .timeout(deadline)
        .connect_with_connector_lazy(local::Connector::new(socket))
}

/// Asks `attempt` again until it answers, or fails with what `what` describes.
pub async fn until<T>(what: &str, attempt: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(DEADLINE, what, attempt).await
}

/// The same, for what takes longer than a step.
pub async fn until_within<T>(
    deadline: Duration,
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = std::time::Instant::now();
    loop {
        let asked = std::time::Instant::now();
        if let Some(found) = attempt().await? {
            return Ok(found);
        }
        if begun.elapsed() > deadline {
            bail!("waited {} s in vain for: {what}", deadline.as_secs());
        }
        // What costs much to ask must not take the processor from what is waited for.
        tokio::time::sleep(asked.elapsed().clamp(Duration::from_millis(50), Duration::from_secs(1))).await;
    }
}
