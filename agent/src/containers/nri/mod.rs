//! A plugin of the Node Resource Interface: the runtime tells of a container after it is made and before it
//! starts, and waits for the answer. By then its policy is in force.
//!
//! The gate is in the kernel, not here: when the runtime does not wait any more, or there is no plugin, a container
//! starts under the `unidentified` policy.

pub mod frames;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytes::{Bytes, BytesMut};
use palisade_proto::runtime::{
    nri::{
        ConfigureRequest, ConfigureResponse, Event, LifecycleRequest, RegisterPluginRequest,
        StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    },
    ttrpc::{Request, Response, Status},
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use self::frames::{Decoder, Message, PLUGIN, REQUEST, RESPONSE, RUNTIME};
use super::{Identity, kubernetes};

const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
const NAME: &str = "palisade";
/// Plugins are called in the order of this index. What others change is of no concern, so the first.
const INDEX: &str = "00";
const EVENTS: &[Event] = &[Event::RunPodSandbox, Event::PostCreateContainer, Event::StartContainer];

/// The runtime's default, where it does not tell its own.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(2);
/// Longest time until a runtime has registered the plugin.
const REGISTRATION: Duration = Duration::from_secs(10);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Code of google.rpc for a method that a server does not have.
const UNIMPLEMENTED: i32 = 12;

/// A container as the runtime describes it.
#[derive(Clone, Debug)]
pub struct Described {
    pub id: String,
    pub identity: Identity,
}

/// What the runtime tells.
#[derive(Debug)]
pub enum Notice {
    /// What exists already: said after every connection.
    Known(Vec<Described>),
    /// A container is made; its start follows.
    Created(Described),
    /// A container is about to start, and waits. Also a pod's sandbox, which some runtimes tell of after its start.
    Starting(Described),
}

/// A notice that the runtime waits for an answer to.
#[derive(Debug)]
pub struct Question {
    pub notice: Notice,
    pub asked: Instant,
    /// How long the runtime waits.
    pub deadline: Duration,
    pub answer: oneshot::Sender<()>,
}

/// Serves the runtimes at `sockets` on a thread of its own, so that an answer is given in time whatever the agent is
/// at. It ends with the agent.
///
/// # Errors
///
/// When there can be no thread.
pub fn spawn(sockets: &[PathBuf], questions: &mpsc::Sender<Question>) -> Result<()> {
    let serving: Vec<_> = sockets.iter().map(|socket| serve(socket.clone(), questions.clone())).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name("nri".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                let tasks: Vec<_> = serving.into_iter().map(tokio::spawn).collect();
                for task in tasks {
                    let _ends_with_the_agent = task.await;
                }
            });
        })
        .context("cannot start the thread that speaks NRI")?;
    Ok(())
}

/// Serves the runtime at `socket` for ever: connects, and connects again when the connection ends.
async fn serve(socket: PathBuf, questions: mpsc::Sender<Question>) {
    let mut wait = FIRST_WAIT;
    let mut said = String::new();
    while !questions.is_closed() {
        let mut registered = false;
        let begun = Instant::now();
        let error = match connection(&socket, &questions, &mut registered).await {
            Ok(()) => "the runtime closed the connection".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        // One that ends at once would be made again and again, and the runtime stops the node's starts for each.
        if registered && begun.elapsed() > LONGEST_WAIT {
            wait = FIRST_WAIT;
            said.clear();
        }
        // A runtime without NRI is no fault; one that ends the connection is worth a line.
        if error != said {
            if registered {
                tracing::warn!(socket = %socket.display(), error, "NRI: connecting again");
            } else {
                tracing::info!(socket = %socket.display(), error, "NRI: not connected; this is tried again");
            }
            said = error;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

async fn connection(socket: &Path, questions: &mpsc::Sender<Question>, registered: &mut bool) -> Result<()> {
    let mut trunk = UnixStream::connect(socket).await.context("cannot connect")?;
    let register = RegisterPluginRequest { plugin_name: NAME.to_owned(), plugin_idx: INDEX.to_owned() };
    let request = Request {
        service: RUNTIME_SERVICE.to_owned(),
        method: "RegisterPlugin".to_owned(),
        payload: register.encode_to_vec().into(),
        timeout_nano: i64::try_from(REGISTRATION.as_nanos()).unwrap_or(i64::MAX),
    };
    send(
        &mut trunk,
        Message { connection: RUNTIME, stream: 1, kind: REQUEST, payload: request.encode_to_vec().into() },
    )
    .await?;
    let mut plugin = Plugin { deadline: DEFAULT_DEADLINE, known: SynchronizeRequest::default(), questions };
    let mut decoder = Decoder::default();
    let begun = Instant::now();
    loop {
        while let Some(message) = decoder.next()? {
            match (message.connection, message.kind) {
                (PLUGIN, REQUEST) => {
                    let request = Request::decode(message.payload).context("a request cannot be read")?;
                    let response = plugin.handle(&request, registered).await?;
                    let payload = response.encode_to_vec().into();
                    let message =
                        Message { connection: PLUGIN, stream: message.stream, kind: RESPONSE, payload };
                    send(&mut trunk, message).await?;
                }
                (RUNTIME, RESPONSE) => {
                    let response = Response::decode(message.payload).context("an answer cannot be read")?;
                    if let Some(status) = response.status.filter(|status| status.code != 0) {
                        bail!("the runtime refuses the plugin: {}", status.message);
                    }
                }
                _ => {}
            }
        }
        let mut bytes = BytesMut::with_capacity(16 << 10);
        let patience = if *registered { Duration::MAX } else { REGISTRATION.saturating_sub(begun.elapsed()) };
        let read = tokio::time::timeout(patience, trunk.read_buf(&mut bytes))
            .await
            .context("the runtime does not register the plugin")?
            .context("cannot read")?;
        if read == 0 {
            return Ok(());
        }
        decoder.push(&bytes);
    }
}

async fn send(trunk: &mut UnixStream, message: Message) -> Result<()> {
    let mut out = BytesMut::new();
    frames::encode(&message, &mut out);
    trunk.write_all(&out).await.context("cannot write")
}

/// One connection's state.
struct Plugin<'a> {
    deadline: Duration,
    /// A synchronization that comes in several messages.
    known: SynchronizeRequest,
    questions: &'a mpsc::Sender<Question>,
}

impl Plugin<'_> {
    async fn handle(&mut self, request: &Request, registered: &mut bool) -> Result<Response> {
        let asked = Instant::now();
        if request.service != PLUGIN_SERVICE {
            return Ok(failure(UNIMPLEMENTED, "no such service"));
        }
        let payload = request.payload.clone();
        if let Ok(timeout @ 1..) = u64::try_from(request.timeout_nano) {
            self.deadline = Duration::from_nanos(timeout);
        }
        let event = match request.method.as_str() {
            "Configure" => {
                let configure = ConfigureRequest::decode(payload)?;
                if let Ok(timeout @ 1..) = u64::try_from(configure.request_timeout) {
                    self.deadline = Duration::from_millis(timeout);
                }
                *registered = true;
                tracing::info!(
                    runtime = configure.runtime_name,
                    version = configure.runtime_version,
                    deadline_ms = self.deadline.as_millis() as u64,
                    "NRI: registered"
                );
                let events = EVENTS.iter().fold(0, |mask, event| mask | 1 << (*event as i32 - 1));
                return Ok(success(ConfigureResponse { events }.encode_to_vec()));
            }
            "Synchronize" => {
                let part = SynchronizeRequest::decode(payload)?;
                self.known.pods.extend(part.pods);
                self.known.containers.extend(part.containers);
                if !part.more {
                    let whole = std::mem::take(&mut self.known);
                    self.ask(Notice::Known(known(&whole)), asked).await?;
                }
                return Ok(success(SynchronizeResponse { more: part.more }.encode_to_vec()));
            }
            "StateChange" => StateChangeEvent::decode(payload)?,
            // What newer runtimes call in place of an event.
            method => {
                let LifecycleRequest { pod, container } = LifecycleRequest::decode(payload)?;
                let event = match method {
                    "RunPodSandbox" => Event::RunPodSandbox,
                    "PostCreateContainer" => Event::PostCreateContainer,
                    "StartContainer" => Event::StartContainer,
                    _ => Event::Unknown,
                };
                StateChangeEvent { event: event as i32, pod, container }
            }
        };
        let described = event
            .pod
            .as_ref()
            .and_then(|pod| event.container.as_ref().map(|container| kubernetes::of_nri(pod, container)));
        let notice = match (event.event(), described) {
            (Event::RunPodSandbox, _) => {
                event.pod.as_ref().map(|pod| Notice::Starting(kubernetes::of_pod(pod)))
            }
            (Event::PostCreateContainer, Some(described)) => Some(Notice::Created(described)),
            (Event::StartContainer, Some(described)) => Some(Notice::Starting(described)),
            _ => None,
        };
        if let Some(notice) = notice {
            self.ask(notice, asked).await?;
        }
        Ok(success(Vec::new()))
    }

    /// Asks the agent, and waits for most of the time that the runtime gives. An agent that is late is no reason to
    /// lose the connection: the kernel's own policy holds until it has worked.
    async fn ask(&self, notice: Notice, asked: Instant) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        let patience = self.deadline * 3 / 4;
        let question = Question { notice, asked, deadline: self.deadline, answer };
        let asking = async {
            self.questions.send(question).await.context("the agent stops")?;
            anyhow::Ok(answered.await)
        };
        match tokio::time::timeout(patience.saturating_sub(asked.elapsed()), asking).await {
            Ok(Err(stops)) => return Err(stops),
            Ok(Ok(_answered_or_agent_stops)) => {}
            Err(_) => tracing::warn!(
                deadline_ms = self.deadline.as_millis() as u64,
                "NRI: answered before the work was done; the container starts under the unidentified policy"
            ),
        }
        Ok(())
    }
}

/// Pods and containers that the runtime has already.
fn known(synchronize: &SynchronizeRequest) -> Vec<Described> {
    let pods = synchronize.pods.iter().map(kubernetes::of_pod);
    let containers = synchronize.containers.iter().filter_map(|container| {
        let pod = synchronize.pods.iter().find(|pod| pod.id == container.pod_sandbox_id)?;
        Some(kubernetes::of_nri(pod, container))
    });
    pods.chain(containers).collect()
}

fn success(payload: Vec<u8>) -> Response {
    Response { status: None, payload: Bytes::from(payload) }
}

fn failure(code: i32, message: &str) -> Response {
    Response { status: Some(Status { code, message: message.to_owned() }), payload: Bytes::new() }
}
