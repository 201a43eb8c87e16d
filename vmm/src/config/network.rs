//! `network-interfaces/{iface_id}`: virtio network devices over taps of the host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::identifier::{BadIdentifier, ResourceId};
use super::limiter::{LimiterUnsupported, RateLimiterBody, refuse_limiter};

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceBody {
    /// Its name; the path's last part.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
    /// The guest's address.
    pub guest_mac: Option<MacAddress>,
    /// The largest packet that the guest is told of.
    pub mtu: Option<u16>,
    /// Limits what the guest receives.
    pub rx_rate_limiter: Option<RateLimiterBody>,
    /// Limits what the guest sends.
    pub tx_rate_limiter: Option<RateLimiterBody>,
}

/// An Ethernet address, written `06:00:ac:10:00:02`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// Text that is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address: expected six pairs of hexadecimal digits with colons between")]
pub struct BadMacAddress(String);

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, BadMacAddress> {
        parse_mac(text)
            .map(Self)
            .ok_or_else(|| BadMacAddress(text.chars().take(40).collect()))
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut bytes {
        let pair = pairs.next()?;
        // from_str_radix would take a sign.
        if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    pairs.next().is_none().then_some(bytes)
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = BadMacAddress;

    fn try_from(text: String) -> Result<Self, BadMacAddress> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

/// Why an interface cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterfaceError {
    /// Not a name.
    #[error("Invalid iface_id: {0}")]
    Id(#[from] BadIdentifier),
    /// Not a name that a network device of Linux could have.
    #[error("Invalid host_dev_name {0:?}: a tap has a name of 1 to 15 bytes without '/', ':' and blanks")]
    TapName(String),
    /// Too small an MTU.
    #[error("Invalid mtu {0}: it must be from 68 to 65535")]
    Mtu(u16),
    /// A rate limit.
    #[error(transparent)]
    Limiter(#[from] LimiterUnsupported),
    /// Two interfaces with one address.
    #[error("The MAC address is already in use: {0}")]
    MacInUse(MacAddress),
}

/// The smallest MTU of an IPv4 network (RFC 791).
const MTU_MIN: u16 = 68;

/// A network interface, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub id: ResourceId,
    /// The tap of the host, which exists or is made.
    pub tap: String,
    /// The guest's address; the guest's own choice if `None`.
    pub mac: Option<MacAddress>,
    /// The largest packet that the guest is told of.
    pub mtu: Option<u16>,
}

/// Whether Linux would take `name` for a network device: the rules of `dev_valid_name`, and no `%`, which would ask
/// the kernel to choose a number.
pub(super) fn is_tap_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    (1..=15).contains(&name.len()) && name != "." && name != ".." && name.bytes().all(allowed)
}

impl TryFrom<InterfaceBody> for Interface {
    type Error = InterfaceError;

    fn try_from(body: InterfaceBody) -> Result<Self, InterfaceError> {
        let id = body.iface_id.parse()?;
        if !is_tap_name(&body.host_dev_name) {
            return Err(InterfaceError::TapName(body.host_dev_name));
        }
        if let Some(mtu) = body.mtu
            && mtu < MTU_MIN
        {
            return Err(InterfaceError::Mtu(mtu));
        }
        refuse_limiter("rx_rate_limiter", body.rx_rate_limiter.as_ref())?;
        refuse_limiter("tx_rate_limiter", body.tx_rate_limiter.as_ref())?;
        Ok(Self {
            id,
            tap: body.host_dev_name,
            mac: body.guest_mac,
            mtu: body.mtu,
        })
    }
}

impl From<&Interface> for InterfaceBody {
    fn from(interface: &Interface) -> Self {
        Self {
            iface_id: interface.id.to_string(),
            host_dev_name: interface.tap.clone(),
            guest_mac: interface.mac,
            mtu: interface.mtu,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_survive_their_text_and_others_are_refused() {
        let mac: MacAddress = "06:00:AC:10:00:02".parse().unwrap();
        assert_eq!(mac.0, [6, 0, 0xac, 0x10, 0, 2]);
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:00:ac:10:00:02",
            "+6:00:ac:10:00:02",
            "é:00",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_no_tap_can_have_and_small_mtus_are_refused() {
        let with = |tap: &str, mtu: u16| {
            let json = format!(r#"{{"iface_id": "eth0", "host_dev_name": "{tap}", "mtu": {mtu}}}"#);
            Interface::try_from(serde_json::from_str::<InterfaceBody>(&json).unwrap())
        };
        assert_eq!(with("tap0", 1500).unwrap().tap, "tap0");
        for tap in ["", "..", "a/b", "tap%d", "a b", "sixteen_bytes_xx"] {
            assert_eq!(with(tap, 1500), Err(InterfaceError::TapName(tap.to_owned())));
        }
        assert_eq!(with("tap0", 67), Err(InterfaceError::Mtu(67)));
    }
}
