//! Device specs as a user may type them: whatever parses is displayed so that it parses to the same again.

use nvme::DeviceSpec;

/// Parses the bytes as a spec.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(spec) = text.parse::<DeviceSpec>() {
        let shown = spec.to_string();
        let again = shown.parse::<DeviceSpec>();
        assert_eq!(again.as_ref().ok(), Some(&spec), "{text:?} is shown as {shown:?}");
    }
}
