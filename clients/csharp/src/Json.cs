using System.Runtime.Serialization.Json;
using System.Text;
using System.Xml;
using System.Xml.Linq;

namespace Safelight
{
    /// <summary>Reads the messages that the library gives as JSON. Without reflection, so that IL2CPP compiles it.</summary>
    internal static class Json
    {
        internal static XElement Parse(string json)
        {
            byte[] text = Encoding.UTF8.GetBytes(json);
            using (var reader = JsonReaderWriterFactory.CreateJsonReader(text, XmlDictionaryReaderQuotas.Max))
            {
                return XElement.Load(reader);
            }
        }

        internal static string Text(XElement message, string field) => (string)message.Element(field) ?? "";

        /// <summary>A number; protobuf writes one of 64 bits as text. 0 where the field is missing.</summary>
        internal static long Number(XElement message, string field) => (long?)message.Element(field) ?? 0;
    }
}
