//! A page of text for whoever asks over HTTP: what Prometheus scrapes.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

/// Connections at a time; others wait in the kernel's queue.
const MOST: usize = 16;
/// How long a connection may last: whoever scrapes asks once.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait when no connection can be accepted.
const BREATH: Duration = Duration::from_millis(100);
/// Of the text format of Prometheus.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Answers `GET /metrics` with what `page` makes, for ever; 503 when it makes nothing.
pub async fn serve<F, P>(listener: TcpListener, page: F)
where
    F: Fn() -> P + Send + Sync + 'static,
    P: Future<Output = Option<String>> + Send,
{
    let page = Arc::new(page);
    let slots = Arc::new(Semaphore::new(MOST));
    loop {
        // Closed only with this task.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        let page = Arc::clone(&page);
        tokio::spawn(async move {
            let _slot = slot;
            let answer = service_fn(|request: Request<Incoming>| {
                let page = Arc::clone(&page);
                async move { Ok::<_, Infallible>(answer(&request, &*page).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            let _peer_gone = tokio::time::timeout(PATIENCE, connection).await;
        });
    }
}

async fn answer<F, P>(request: &Request<Incoming>, page: &F) -> Response<Full<Bytes>>
where
    F: Fn() -> P,
    P: Future<Output = Option<String>>,
{
    let (status, text) = if request.uri().path() != "/metrics" {
        (StatusCode::NOT_FOUND, "this answers GET /metrics\n".to_owned())
    } else if request.method() != hyper::Method::GET {
        (StatusCode::METHOD_NOT_ALLOWED, "this answers GET /metrics\n".to_owned())
    } else {
        page().await.map_or_else(
            || (StatusCode::SERVICE_UNAVAILABLE, "it is stopping\n".to_owned()),
            |text| (StatusCode::OK, text),
        )
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(CONTENT_TYPE));
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    #[tokio::test]
    async fn metrics_are_answered_and_nothing_else_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, async || Some("palisade_info 1\n".to_owned())));
        let ask = async |request: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let _silent = TcpStream::connect(address).await.unwrap();
        let answer = ask("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("palisade_info 1\n"), "{answer}");
        assert!(answer.contains(CONTENT_TYPE), "{answer}");
        for (request, status) in
            [("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404), ("POST /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 405)]
        {
            let answer = ask(request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        }
        assert!(ask("\r\n\r\nnonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    }
}
