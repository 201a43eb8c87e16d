//! Answers, as Firecracker's clients expect them: 200 with JSON, 204 with nothing, 400 with a `fault_message`.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, SERVER};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;

use super::error::RequestError;
use crate::control::{Outcome, Reply};

pub(super) type Answer = Response<Full<Bytes>>;

/// The draft that Firecracker follows: the request used something that will go away.
const DEPRECATION: HeaderName = HeaderName::from_static("deprecation");

fn answer(status: StatusCode, body: Bytes) -> Answer {
    let has_body = !body.is_empty();
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    // Firecracker's name: some clients look whom they talk to.
    answer
        .headers_mut()
        .insert(SERVER, HeaderValue::from_static("Firecracker API"));
    if has_body {
        answer
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    answer
}

pub(super) fn ok(body: &impl Serialize) -> Answer {
    match serde_json::to_vec(body) {
        Ok(body) => answer(StatusCode::OK, body.into()),
        // A path that is not UTF-8 has no JSON form.
        Err(error) => fault(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("The answer has no JSON form: {error}"),
        ),
    }
}

pub(super) fn no_content() -> Answer {
    answer(StatusCode::NO_CONTENT, Bytes::new())
}

pub(super) fn fault(status: StatusCode, text: &str) -> Answer {
    answer(status, json!({ "fault_message": text }).to_string().into())
}

/// A refusal. What Firecracker's HTTP layer refuses, before its API sees it, comes under `error` there; whoever looks
/// for that finds it, and whoever looks for a `fault_message` too.
pub(super) fn refusal(error: &RequestError) -> Answer {
    let text = error.to_string();
    match error {
        RequestError::Method | RequestError::TooLarge { .. } | RequestError::Body(_) => {
            let body = json!({ "error": text, "fault_message": text }).to_string();
            let mut answer = answer(StatusCode::BAD_REQUEST, body.into());
            // What follows on this connection may be the body that nobody read.
            answer
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
            answer
        }
        _ => fault(StatusCode::BAD_REQUEST, &text),
    }
}

pub(super) fn outcome(outcome: Outcome) -> Answer {
    match outcome {
        Ok(Reply::Empty) => no_content(),
        Ok(Reply::Machine(machine)) => ok(&machine),
        Ok(Reply::Config(config)) => ok(&config),
        Err(refused) => fault(StatusCode::BAD_REQUEST, &refused.to_string()),
    }
}

pub(super) fn with_deprecation(mut answer: Answer) -> Answer {
    answer
        .headers_mut()
        .insert(DEPRECATION, HeaderValue::from_static("true"));
    answer
}
