//! Docker's engine, which names containers and gives them labels without any Kubernetes.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, header::HOST};
use hyper_util::rt::TokioIo;
use palisade_profile::selector::ContainerFacts;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{Identity, mounts};

/// Longest description of a container that is read.
const LONGEST_ANSWER: usize = 4 << 20;

/// Longest wait for an answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// A label of containers that Docker runs for Kubernetes, which knows them better.
const OF_A_POD: &str = "io.kubernetes.pod.name";

/// What Docker says of the container `id`; `None` when it has none, or it is a pod's.
///
/// # Errors
///
/// When Docker cannot be asked, or does not answer in time.
pub async fn ask(socket: &Path, id: &str) -> Result<Option<Identity>> {
    tokio::time::timeout(DEADLINE, inspect(socket, id)).await.context("Docker does not answer")?
}

async fn inspect(socket: &Path, id: &str) -> Result<Option<Identity>> {
    let stream = UnixStream::connect(socket).await.context("cannot connect")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("/containers/{id}/json"))
        .header(HOST, "docker")
        .body(Empty::<Bytes>::new())
        .context("cannot make the request")?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LONGEST_ANSWER)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("cannot read the answer: {error}"))?
        .to_bytes();
    connection.abort();
    match status {
        StatusCode::OK => {
            let found = identity(&serde_json::from_slice(&body).context("not JSON")?);
            Ok((!found.facts.labels.contains_key(OF_A_POD)).then_some(found))
        }
        StatusCode::NOT_FOUND => Ok(None),
        other => bail!("Docker answers {other}: {}", String::from_utf8_lossy(&body).trim()),
    }
}

fn identity(container: &Value) -> Identity {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let config = &container["Config"];
    let labels = config["Labels"].as_object().into_iter().flatten();
    Identity {
        facts: ContainerFacts {
            name: text(&container["Name"]).trim_start_matches('/').to_owned(),
            image: text(&config["Image"]),
            labels: labels
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect(),
            ..ContainerFacts::default()
        },
        image_digest: text(&container["Image"]),
        mounts: mounts::of_docker(container),
        by: "docker",
        ..Identity::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Docker 26 answers, shortened.
    #[test]
    fn a_container_has_the_name_image_and_labels_that_docker_knows() {
        let found = identity(&serde_json::json!({
            "Id": "0123", "Name": "/web", "Image": "sha256:9f86d0",
            "Config": {"Image": "nginx:1.27", "Labels": {"com.docker.compose.service": "web"}},
        }));
        assert_eq!((found.facts.name.as_str(), found.facts.image.as_str()), ("web", "nginx:1.27"));
        assert_eq!(found.image_digest, "sha256:9f86d0");
        assert_eq!(found.facts.labels["com.docker.compose.service"], "web");
        assert_eq!(identity(&Value::Null).facts, ContainerFacts::default());
    }
}
