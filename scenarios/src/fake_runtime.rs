//! A container runtime that knows thousands of containers, as far as the agent asks one over the Kubernetes runtime interface.

use std::{
    convert::Infallible,
    future::Future,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use anyhow::Result;
use k8s_cri::v1::{
    Container, ContainerMetadata, ContainerStatusRequest, ContainerStatusResponse, ImageSpec,
    ImageStatusRequest, ImageStatusResponse, ListContainersRequest, ListContainersResponse,
    PodSandboxMetadata, PodSandboxStatus, PodSandboxStatusRequest, PodSandboxStatusResponse,
};
use tokio::{net::UnixListener, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::http,
    server::{Grpc, NamedService},
    transport::Server,
};
use tonic_prost::ProstCodec;
use tower::service_fn;

/// The id of a container: its number, as long as ids are.
pub fn id(number: usize) -> String {
    format!("{number:064x}")
}

/// Its name within its pod, which one of `profiles` selects.
pub fn name(number: usize, profiles: usize) -> String {
    format!("c-{}-{number}", number % profiles)
}

/// Answers at `socket` until the handle is dropped.
pub fn serve(socket: &Path, profiles: usize) -> Result<JoinHandle<Result<(), tonic::transport::Error>>> {
    let listener = UnixListener::bind(socket)?;
    let incoming = futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    let server = Server::builder().add_service(Runtime { profiles }).add_service(Images);
    Ok(tokio::spawn(server.serve_with_incoming(incoming)))
}

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

macro_rules! answer {
    ($request:expr, $question:ty, $answer:expr) => {
        Box::pin(async move {
            let answer = $answer;
            let method = service_fn(move |question: Request<$question>| {
                let answered = answer(question.into_inner());
                async move { Ok::<_, Status>(Response::new(answered)) }
            });
            Ok(Grpc::new(ProstCodec::default()).unary(method, $request).await)
        })
    };
}

#[derive(Clone)]
struct Runtime {
    profiles: usize,
}

impl NamedService for Runtime {
    const NAME: &'static str = "runtime.v1.RuntimeService";
}

impl tower::Service<http::Request<Body>> for Runtime {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        let profiles = self.profiles;
        match request.uri().path().rsplit('/').next() {
            Some("ListContainers") => {
                answer!(request, ListContainersRequest, move |question| listed(&question, profiles))
            }
            Some("PodSandboxStatus") => answer!(request, PodSandboxStatusRequest, pod),
            Some("ContainerStatus") => {
                answer!(request, ContainerStatusRequest, |_| ContainerStatusResponse::default())
            }
            _ => Box::pin(async { Ok(Status::unimplemented("the agent does not ask that").into_http()) }),
        }
    }
}

fn listed(question: &ListContainersRequest, profiles: usize) -> ListContainersResponse {
    let wanted = question.filter.as_ref().map_or("", |filter| filter.id.as_str());
    let Ok(number) = usize::from_str_radix(wanted, 16) else { return ListContainersResponse::default() };
    let container = Container {
        id: wanted.to_owned(),
        pod_sandbox_id: format!("pod-{number}"),
        metadata: Some(ContainerMetadata { name: name(number, profiles), attempt: 0 }),
        image: Some(ImageSpec { image: "palisade.test/limits:1".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    ListContainersResponse { containers: vec![container] }
}

fn pod(question: PodSandboxStatusRequest) -> PodSandboxStatusResponse {
    let id = question.pod_sandbox_id;
    let metadata = PodSandboxMetadata {
        name: id.clone(),
        uid: format!("uid-{id}"),
        namespace: "limits".to_owned(),
        attempt: 0,
    };
    let status = PodSandboxStatus { id, metadata: Some(metadata), ..Default::default() };
    PodSandboxStatusResponse { status: Some(status), ..Default::default() }
}

#[derive(Clone)]
struct Images;

impl NamedService for Images {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl tower::Service<http::Request<Body>> for Images {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        answer!(request, ImageStatusRequest, |_| ImageStatusResponse::default())
    }
}
